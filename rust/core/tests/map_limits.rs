//! The limits of a process, in a process of their own: they hold for all its threads.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::Write;
use std::os::fd::AsFd;

use lamina_core::map::{MapError, OwnedMap, page_bytes};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn a_refusal_names_the_limit_and_leaves_the_range_usable() {
    too_many_mappings();
    too_many_addresses();
}

#[expect(clippy::print_stderr, reason = "what is not tried is said")]
fn too_many_mappings() {
    let page = page_bytes();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![5; page]).unwrap();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 1 << 20 {
        eprintln!("not tried: `vm.max_map_count` is {limit}, too many mappings to make in a test");
        return;
    }
    // A page of the file at every second page of the range: each makes two mappings more.
    let mut map = OwnedMap::reserve((limit + 2) * page, 0).unwrap();
    let mut placed = 0;
    let refused = loop {
        assert!(2 * placed < limit, "the system allows more mappings than it says");
        match map.place(2 * placed * page, file.as_fd(), 0, page) {
            Ok(()) => placed += 1,
            Err(refused) => break refused,
        }
    };
    assert!(matches!(refused, MapError::MapCount { .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.ends_with(&format!("`vm.max_map_count` is {limit}")), "{text}");
    assert_eq!(map.bytes().len(), 2 * placed * page, "the range ends before the refused part");
    let (before, last) = map.bytes().split_at(2 * (placed - 1) * page);
    assert!(before.starts_with(&[5]));
    assert!(last.starts_with(&[5]) && last.ends_with(&[0]));
}

fn too_many_addresses() {
    let before = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(64 << 30), maximum: before.maximum }).unwrap();
    let refused = OwnedMap::reserve(65 << 30, 0).unwrap_err();
    setrlimit(Resource::As, before).unwrap();
    assert_eq!(
        refused.to_string(),
        "cannot map 69793218560 bytes: the process is limited to 68719476736 bytes of addresses \
         (`ulimit -v`, RLIMIT_AS)"
    );
    OwnedMap::reserve(65 << 30, 0).unwrap();
}

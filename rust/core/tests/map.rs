//! Mappings: what they show, what a write to them reaches, and when they go.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use lamina_core::map::{HUGE_PAGE_BYTES, MapError, OwnedMap, ReadMap, page_bytes};
use proptest::prelude::*;

fn file_of(bytes: &[u8]) -> fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// Bytes that differ from page to page and inside a page.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at ^ (at >> 8) ^ (at >> 16)) & 0xff).unwrap()).collect()
}

fn is_mapped(file: &Path) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.contains(file.to_str().unwrap())
}

#[test]
fn a_read_map_shows_the_file() {
    for length in [1, 4096, 5000, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 17] {
        let bytes = pattern(length);
        let map = ReadMap::new(file_of(&bytes).as_fd(), length as u64).unwrap();
        assert_eq!(map.bytes(), bytes);
        if length >= HUGE_PAGE_BYTES {
            assert_eq!(map.bytes().as_ptr().addr() % HUGE_PAGE_BYTES, 0);
        }
    }
}

#[test]
fn nothing_is_a_length_like_any_other() {
    let empty = file_of(b"");
    assert_eq!(ReadMap::new(empty.as_fd(), 0).unwrap().bytes(), b"");
    for make in [OwnedMap::anonymous, |length| OwnedMap::reserve(length, 4096 * 16)] {
        let mut map = make(0).unwrap();
        map.place(0, empty.as_fd(), 0, 0).unwrap();
        assert!(map.bytes_mut().is_empty());
        let map = map.share();
        assert!(map.is_empty());
        map.copy_to(0, &mut []).unwrap();
        assert_eq!(map.as_ptr().addr() % 64, 0);
    }
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let file = file_of(&pattern(5000));
    let refused = ReadMap::new(file.as_fd(), 5001).unwrap_err();
    assert_eq!(refused.to_string(), "cannot map a file up to byte 5001: its size is 5000");
    let page = page_bytes();
    let mut map = OwnedMap::reserve(4 * page, 0).unwrap();
    let refused = map.place(0, file.as_fd(), page as u64, 2 * page).unwrap_err();
    assert!(matches!(refused, MapError::BeyondFile { size_bytes: 5000, .. }));
    assert_eq!(map.bytes(), vec![0; 4 * page]);
}

#[test]
fn fresh_memory_is_zeroed_and_aligned_at_every_size() {
    for length in [1, 63, 4096, 128 << 10, (128 << 10) + 1, 3 << 20, 4 << 20, 9_000_001] {
        let mut map = OwnedMap::anonymous(length).unwrap();
        assert_eq!(map.bytes_mut().len(), length);
        assert!(map.bytes().iter().all(|byte| *byte == 0));
        map.bytes_mut().fill(3);
        assert_eq!(map.bytes().as_ptr().addr() % 64, 0);
        let map = map.share();
        assert!(!map.is_column());
        let mut last = [0];
        map.copy_to(length - 1, &mut last).unwrap();
        assert_eq!(last, [3]);
    }
}

#[test]
fn lengths_that_no_range_has_are_refused() {
    assert_eq!(
        OwnedMap::anonymous(usize::MAX).unwrap_err(),
        MapError::TooLong { length_bytes: u64::MAX }
    );
    assert!(OwnedMap::reserve(isize::MAX.unsigned_abs(), 0).is_err());
    let file = file_of(b"abc");
    assert!(matches!(ReadMap::new(file.as_fd(), u64::MAX), Err(MapError::TooLong { .. })));
    assert!(ReadMap::new(file.as_fd(), 1 << 62).is_err());
}

#[test]
fn a_range_is_congruent_to_what_was_asked_for() {
    for congruent in [0, 64 << 10, 17 << 16, (2 << 20) - (64 << 10), (5 << 30) + (64 << 10)] {
        let map = OwnedMap::reserve(100_000, congruent).unwrap().share();
        let wanted = usize::try_from(congruent).unwrap() % HUGE_PAGE_BYTES;
        assert_eq!(map.as_ptr().addr() % HUGE_PAGE_BYTES, wanted);
        assert!(map.is_column());
    }
    let refused = OwnedMap::reserve(100_000, 100).unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("offset 100 is not a multiple of the page size {}", page_bytes())
    );
}

#[test]
fn addresses_far_beyond_the_memory_can_be_reserved() {
    let map = OwnedMap::reserve(16 << 40, 0).unwrap();
    assert_eq!(map.bytes().len(), 16 << 40);
    assert_eq!(map.bytes()[(16 << 40) - 1], 0);
}

#[test]
fn what_is_placed_is_private_and_what_follows_it_can_be_written() {
    let page = page_bytes();
    let bytes = pattern(6 * page);
    let file = file_of(&bytes);
    let mut map = OwnedMap::reserve(4 * page, page as u64).unwrap();
    map.place(0, file.as_fd(), page as u64, page).unwrap();
    // A short part: its last page shows what follows in the file until it is written over.
    map.place(page, file.as_fd(), 4 * page as u64, page + 10).unwrap();
    assert_eq!(map.bytes()[..page], bytes[page..2 * page]);
    assert_eq!(map.bytes()[page..3 * page], bytes[4 * page..]);
    assert!(map.bytes()[3 * page..].iter().all(|byte| *byte == 0));
    map.bytes_mut()[2 * page + 10..].fill(9);
    map.bytes_mut()[0] = 255;

    let mut again = vec![0; 2 * page];
    map.share().copy_to(2 * page, &mut again).unwrap();
    assert_eq!(again[..10], bytes[5 * page..5 * page + 10]);
    assert!(again[10..].iter().all(|byte| *byte == 9));
    let on_disk = ReadMap::new(file.as_fd(), bytes.len() as u64).unwrap();
    assert_eq!(on_disk.bytes(), bytes);
}

#[test]
fn parts_are_placed_on_whole_pages_inside_their_range_only() {
    let page = page_bytes();
    let file = file_of(&pattern(8 * page));
    let mut map = OwnedMap::reserve(2 * page, 0).unwrap();
    let mut place = |at, offset, length| map.place(at, file.as_fd(), offset, length);
    assert!(matches!(place(1, 0, page), Err(MapError::Unaligned { offset: 1, .. })));
    assert!(matches!(place(0, 17, page), Err(MapError::Unaligned { offset: 17, .. })));
    assert_eq!(
        place(page, 0, page + 1).unwrap_err(),
        MapError::BeyondRange { end: 2 * page + 1, length_bytes: 2 * page }
    );
    assert!(matches!(place(usize::MAX - page + 1, 0, page), Err(MapError::BeyondRange { .. })));
    assert!(matches!(place(2 * page, 0, 1), Err(MapError::BeyondRange { .. })));
    place(page, 0, page).unwrap();
    for length in [page, 64 * page] {
        let mut fresh = OwnedMap::anonymous(length).unwrap();
        let refused = fresh.place(0, file.as_fd(), 0, page).unwrap_err();
        assert_eq!(refused, MapError::BeyondRange { end: page, length_bytes: 0 });
    }
}

#[test]
fn a_file_open_for_nothing_but_writing_cannot_be_mapped() {
    let directory = tempfile::tempdir().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(directory.path().join("shard"))
        .unwrap();
    file.set_len(4096).unwrap();
    let refused = ReadMap::new(file.as_fd(), 4096).unwrap_err();
    assert_eq!(refused.to_string(), "cannot map 4096 bytes: Permission denied (os error 13)");
}

#[test]
fn a_mapping_goes_with_its_last_owner_on_any_thread() {
    let page = page_bytes();
    let bytes = pattern(64 * page);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let mut map = OwnedMap::reserve(64 * page, 0).unwrap();
    map.place(0, file.as_file().as_fd(), 0, 64 * page).unwrap();
    let map = Arc::new(map.share());
    let other = Arc::clone(&map);
    drop(map);
    assert!(is_mapped(file.path()));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let map = Arc::clone(&other);
            thread::spawn(move || {
                let mut out = vec![0; 64 * page];
                map.copy_to(0, &mut out).unwrap();
                out
            })
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.join().unwrap(), bytes);
    }
    thread::spawn(move || drop(other)).join().unwrap();
    assert!(!is_mapped(file.path()));
}

#[test]
fn copies_stay_inside_the_range() {
    let map = OwnedMap::anonymous(100).unwrap().share();
    assert_eq!(
        map.copy_to(90, &mut [0; 11]).unwrap_err().to_string(),
        "byte 101 lies outside a range of 100 bytes"
    );
    assert!(map.copy_to(usize::MAX, &mut [0; 2]).is_err());
    map.copy_to(100, &mut []).unwrap();
}

proptest! {
    /// A column stitched from any parts of a file equals those parts one after another.
    #[test]
    fn a_stitched_range_equals_its_parts(
        parts in prop::collection::vec((0_usize..12, 1_usize..4), 1..6),
        tail in 0_usize..5000,
    ) {
        let page = page_bytes();
        let bytes = pattern(16 * page);
        let file = file_of(&bytes);
        let pages: usize = parts.iter().map(|(_, count)| count).sum();
        let mut map = OwnedMap::reserve(pages * page + tail, 0).unwrap();
        let mut expected = Vec::new();
        for (first, count) in parts {
            let (offset, length) = (first * page, count * page);
            map.place(expected.len(), file.as_fd(), offset as u64, length).unwrap();
            expected.extend_from_slice(&bytes[offset..offset + length]);
        }
        map.bytes_mut()[pages * page..].fill(0x5a);
        expected.resize(pages * page + tail, 0x5a);
        prop_assert_eq!(map.bytes(), &expected[..]);
    }
}

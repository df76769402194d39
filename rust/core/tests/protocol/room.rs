//! A full disk: an error with numbers, and the room given back.

use lamina_core::disk::Directory;
use lamina_core::dtype::Dtype;
use lamina_core::layout::SiteSpec;
use lamina_core::{Error, NewStore, Pace, Window, Writer};

use crate::support::{Job, disk, folder};
use crate::tools::{Watched, files, parts};

#[test]
fn a_shard_that_does_not_fit_is_an_error_with_needed_and_free_bytes() {
    let directory = folder();
    let disk = disk(directory.path());
    let row = 4 << 20;
    let new = NewStore {
        sites: vec![SiteSpec { path: "big".into(), dtype: Dtype::U8, shape: vec![row] }],
        identity: String::from("{}"),
        about: String::from("{}"),
        shard_bytes: 1 << 43,
        texts: false,
    };
    let pace = Pace { rows_total: Some(1 << 20), commit_every: std::time::Duration::MAX };
    let mut writer = Writer::begin(disk.clone(), disk.lock().unwrap(), new, pace).unwrap();
    let values = vec![1u8; usize::try_from(row).unwrap()];
    let window = Window {
        columns: &[&values],
        tokens: &vec![0; 4],
        positions: &[0],
        flags: &vec![0; 1],
        prompt_rows: &[1],
        prompt_lengths: &[1],
        prompt_ids: &[0; 4],
        texts: None,
        overflow: &[],
    };
    let error = writer.append(&window).unwrap_err();
    let Error::Full { needed, free, .. } = &error else { panic!("{error}") };
    assert!(*needed > 1 << 42 && *free < *needed, "{error}");
    let text = error.to_string();
    assert!(text.starts_with("no room left on the disk of"), "{text}");
    assert!(text.contains("what was committed is kept"), "{text}");
    assert_eq!(files(directory.path(), "shards"), [""; 0], "the room is given back");
    assert!(matches!(writer.append(&window), Err(Error::Closed { .. })));
    assert!(Directory::open(directory.path()).unwrap().free_bytes().unwrap() > 0);
}

#[test]
fn a_disk_that_fills_up_keeps_what_was_committed_and_gives_back_the_rest() {
    let job = Job::new(&[vec![(5, 5)], vec![(9, 9)], vec![(4, 4)]], 8);
    for what in ["reserve shards/piece", "write shards/filling.part", "write shards/piece"] {
        let directory = folder();
        let (disk, events) = Watched::over(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        job.append_all(&mut writer, 0, 1);
        writer.commit().unwrap();
        events.lock().unwrap().fail = Some((what.to_owned(), std::io::ErrorKind::StorageFull));
        let result = job.append(&mut writer, 1).and_then(|_| writer.commit());
        assert!(result.is_err(), "{what}");
        assert_eq!(parts(directory.path()), 0, "{what}");
        drop(writer);
        job.check(directory.path(), 1);
        let mut writer = job.resume(&disk).unwrap();
        job.append_all(&mut writer, 1, 3);
        writer.finish().unwrap();
        job.check(directory.path(), 3);
    }
}

//! Rules 3, 6, 11, 14 and 15: what a commit names, when it comes, what is durable, what counts.

use std::time::Duration;

use lamina_core::{Error, Store, Writer};

use crate::support::{Job, disk, folder};
use crate::tools::{Watched, files, manifest, newest};

/// Windows that end inside a shard, at its end, inside a prompt of the next.
fn job() -> Job {
    Job::new(&[vec![(3, 3)], vec![(5, 5)], vec![(10, 11)], vec![], vec![(1, 1), (0, 2)]], 8)
}

#[test]
fn every_commit_names_exactly_the_rows_of_the_windows_it_counts() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    for window in 0..job.windows.len() {
        job.append_all(&mut writer, window, window + 1);
        // What is appended is not seen before its commit.
        job.check(directory.path(), window);
        writer.commit().unwrap();
        job.check(directory.path(), window + 1);
        let store = Store::open(directory.path(), None).unwrap();
        assert_eq!(store.manifest().windows, window as u64 + 1);
        let before = Store::open(directory.path(), Some(window as u64 + 1)).unwrap();
        job.compare(&before, window).unwrap();
    }
}

#[test]
fn commits_come_when_their_time_has_passed() {
    let (directory, job) = (folder(), job());
    let disk = disk(directory.path());
    let pace = job.paced(Duration::from_millis(30));
    let mut writer =
        Writer::begin(disk.clone(), disk.lock().unwrap(), job.new_store(), pace).unwrap();
    std::thread::sleep(Duration::from_millis(40));
    assert!(job.append(&mut writer, 0).unwrap());
    assert_eq!(newest(directory.path()).windows, 1);
    // Full shards alone do not ask for one.
    drop(writer);
    let mut writer = job.resume(&disk).unwrap();
    assert!(!job.append(&mut writer, 1).unwrap());
    assert!(!job.append(&mut writer, 2).unwrap());
    assert_eq!(newest(directory.path()).version, 2);
}

#[test]
fn a_version_that_is_resumed_is_made_durable_first() {
    let (directory, job) = (folder(), job());
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.commit().unwrap();
    drop(writer);
    let (disk, events) = Watched::over(directory.path());
    let writer = job.resume(&disk).unwrap();
    let log = events.lock().unwrap().log.clone();
    let first_change = log.iter().position(|event| {
        ["create", "write", "remove", "rename", "link"].iter().any(|verb| event.starts_with(verb))
    });
    let before = &log[..first_change.unwrap()];
    for folder in ["sync shards/", "sync manifests/"] {
        assert!(before.iter().any(|event| event == folder), "{folder} is missing in {before:?}");
    }
    drop(writer);
}

#[test]
fn shards_are_durable_before_the_manifest_and_the_manifest_before_its_name() {
    let (directory, job) = (folder(), job());
    let (disk, events) = Watched::over(directory.path());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 3);
    events.lock().unwrap().log.clear();
    writer.commit().unwrap();
    let log = events.lock().unwrap().log.clone();
    let at = |what: &str| {
        log.iter().position(|event| event.starts_with(what)).unwrap_or_else(|| panic!("no {what}"))
    };
    let order = [
        at("sync shards/piece.part"),
        at("rename shards/piece.part"),
        at("sync shards/"),
        at("sync manifests/next.part"),
        at("link manifests/next.part 00000000000000000002.json"),
    ];
    // "sync shards/" also begins the name of the file: the folder's own comes after the rename.
    let folder = log.iter().position(|event| event == "sync shards/").unwrap();
    assert!(order[0] < order[1] && order[1] < folder && folder < order[3] && order[3] < order[4]);
    let last = log.iter().position(|event| event == "sync manifests/").unwrap();
    assert!(order[4] < last);
}

#[test]
fn an_fsync_that_fails_ends_the_writer_and_is_not_tried_again() {
    for what in [
        "sync shards/piece.part",
        "sync shards/\u{0}",
        "sync manifests/next.part",
        "sync manifests/",
    ] {
        let (directory, job) = (folder(), job());
        let (disk, events) = Watched::over(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        job.append_all(&mut writer, 0, 1);
        {
            let mut events = events.lock().unwrap();
            events.log.clear();
            events.fail = Some((what.replace('\u{0}', ""), std::io::ErrorKind::Other));
        }
        let error = writer.commit().unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{what}: {error}");
        let text = job.append(&mut writer, 1).unwrap_err().to_string();
        assert!(text.starts_with("this writer has ended: an earlier step failed"), "{text}");
        assert!(matches!(writer.commit(), Err(Error::Closed { .. })));
        assert!(matches!(writer.finish(), Err(Error::Closed { .. })));
        drop(writer);
        let log = events.lock().unwrap().log.clone();
        let syncs = log.iter().filter(|event| event.starts_with("sync")).collect::<Vec<_>>();
        let failed = syncs.last().unwrap();
        assert!(failed.starts_with(&what.replace('\u{0}', "")), "{syncs:?}");
    }
}

#[test]
fn format_and_version_one_are_there_before_the_first_window() {
    let (directory, job) = (folder(), job());
    let (disk, events) = Watched::over(directory.path());
    let writer = job.begin(&disk).unwrap();
    let log = events.lock().unwrap().log.clone();
    let at = |what: &str| log.iter().position(|event| event == what).unwrap();
    assert!(at("sync /FORMAT") < at("sync /"));
    assert!(at("sync /") < at("link manifests/next.part 00000000000000000001.json"));
    assert_eq!(std::fs::read(directory.path().join("FORMAT")).unwrap(), b"lamina 1.0\n");
    let first = manifest(directory.path(), 1);
    assert_eq!((first.identity.get(), first.shards.len()), (r#"{"made":"up"}"#, 0));
    assert!(!first.complete);
    assert_eq!(first.store.len(), 32);
    drop(writer);
    job.check(directory.path(), 0);
}

#[test]
fn a_store_is_complete_only_when_its_pieces_are_replaced() {
    let (directory, job) = (folder(), job());
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    for window in 0..job.windows.len() {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
        assert!(!newest(directory.path()).complete);
    }
    writer.finish().unwrap();
    let last = newest(directory.path());
    let before = manifest(directory.path(), last.version - 1);
    assert!(last.complete && !before.complete);
    // The version before names the replacement too, so that the pieces are gone.
    assert_eq!(before.shards, last.shards);
    assert_eq!(files(directory.path(), "shards").len(), last.shards.len());
    let short = last.shards.iter().filter(|shard| shard.rows < 8).count();
    assert!(short <= 1);
    drop(writer);
    // Ending a complete store again changes nothing.
    let mut writer = job.resume(&disk(directory.path())).unwrap();
    writer.finish().unwrap();
    assert_eq!(newest(directory.path()).version, last.version);
}

#[test]
fn a_resume_with_all_windows_done_replaces_the_pieces() {
    let (directory, job) = (folder(), job());
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    for window in 0..job.windows.len() {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    drop(writer);
    let mut writer = job.resume(&disk(directory.path())).unwrap();
    writer.finish().unwrap();
    assert_eq!(crate::support::shard_names(writer.manifest()), job.names());
    assert!(newest(directory.path()).complete);
}

#[test]
fn values_of_a_window_that_is_done_again_are_counted_once() {
    // Every row number of these has a NaN or an infinity now and then.
    let job = Job::new(&[vec![(20, 20)], vec![(30, 30)], vec![(9, 9)]], 16);
    assert!(job.all().counts[0].iter().take(2).all(|&count| count > 1));
    let directory = folder();
    let disk = disk(directory.path());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.commit().unwrap();
    job.append_all(&mut writer, 1, 2);
    drop(writer);
    let mut writer = job.resume(&disk).unwrap();
    job.append_all(&mut writer, 1, 2);
    writer.commit().unwrap();
    job.check(directory.path(), 2);
    job.append_all(&mut writer, 2, 3);
    writer.finish().unwrap();
    job.check(directory.path(), 3);
}

#[test]
fn numbers_stand_per_shard() {
    let (directory, job) = (folder(), Job::new(&[vec![(32, 32)]], 16));
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    // NaN at rows 3 and 20, infinite at 5 and 28, overflow 2 at 4, 17 and 30.
    let counts: Vec<_> = newest(directory.path()).shards.into_iter().map(|s| s.counts).collect();
    assert_eq!(counts, [[[0, 1, 1, 0], [1, 0, 0, 2]], [[0, 1, 1, 0], [1, 0, 0, 4]]]);
    assert_eq!(files(directory.path(), "shards").len(), 2);
}

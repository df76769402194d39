//! Rules 10, 11, 12 and 14: which files there are, what is written to them, what is removed.

use std::collections::BTreeSet;

use lamina_core::layout::Size;
use lamina_core::{Error, Probe, Store, probe};

use crate::support::{Job, ROW_BYTES, disk, folder};
use crate::tools::{Watched, files, manifest, newest};

fn job() -> Job {
    Job::new(&[vec![(3, 3)], vec![(5, 5)], vec![(10, 11)], vec![(1, 1)]], 8)
}

#[test]
fn the_two_newest_versions_are_kept_and_foreign_names_stay() {
    let (directory, job) = (folder(), job());
    let path = directory.path();
    let mut writer = job.begin(&disk(path)).unwrap();
    for name in ["shards/notes.txt", "shards/short.safetensors", "manifests/README"] {
        std::fs::write(path.join(name), "mine").unwrap();
    }
    for window in 0..job.windows.len() {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    writer.finish().unwrap();
    let version = newest(path).version;
    assert_eq!(version, 7);
    let names = ["00000000000000000006.json", "00000000000000000007.json", "README"];
    assert_eq!(files(path, "manifests"), names);
    let mut expected: BTreeSet<String> = [version - 1, version]
        .iter()
        .flat_map(|&version| manifest(path, version).shards)
        .map(|entry| entry.file_name())
        .collect();
    expected.extend(["notes.txt", "short.safetensors"].map(String::from));
    assert_eq!(files(path, "shards"), expected.into_iter().collect::<Vec<_>>());
}

#[test]
fn a_start_removes_temporary_files_and_shards_outside_the_two_newest_versions() {
    let (directory, job) = (folder(), job());
    let path = directory.path();
    let mut writer = job.begin(&disk(path)).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.commit().unwrap();
    drop(writer);
    let before = files(path, "shards");
    let orphan = format!("shards/{}.safetensors", "0a".repeat(16));
    for name in ["shards/filling.part", "shards/old.part", "manifests/next.part", &orphan] {
        std::fs::write(path.join(name), "left by a crash").unwrap();
    }
    let mut writer = job.resume(&disk(path)).unwrap();
    assert!(!path.join("shards/old.part").exists() && !path.join("manifests/next.part").exists());
    writer.close();
    assert_eq!(files(path, "shards"), before);
    assert_eq!(files(path, "manifests").len(), 2);
}

#[test]
fn a_directory_with_our_names_and_no_version_counts_as_empty() {
    for format in ["", "lam", "\0\0\0\0\0\0\0\0\0\0\0", "lamina 1.0\n"] {
        let (directory, job) = (folder(), job());
        let path = directory.path();
        for name in ["manifests", "shards", "spool"] {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        for name in ["LOCK", "OWNER", "shards/piece.part", "manifests/next.part"] {
            std::fs::write(path.join(name), "").unwrap();
        }
        std::fs::write(path.join("FORMAT"), format).unwrap();
        assert_eq!(probe(path).unwrap(), Probe::Unready, "{format:?}");
        let error = Store::open(path, None).unwrap_err();
        assert!(matches!(error, Error::NotReady { .. }), "{format:?}: {error}");
        let mut writer = job.begin(&disk(path)).unwrap();
        job.append_all(&mut writer, 0, 4);
        writer.finish().unwrap();
        job.check(path, 4);
        assert_eq!(files(path, ""), ["FORMAT", "LOCK", "OWNER", "manifests", "shards"]);
    }
}

#[test]
fn shards_without_any_version_are_refused_and_left_alone() {
    let (directory, job) = (folder(), job());
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 4);
    writer.finish().unwrap();
    drop(writer);
    let before = files(directory.path(), "shards");
    std::fs::remove_dir_all(directory.path().join("manifests")).unwrap();
    let error = job.begin(&disk(directory.path())).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    assert_eq!(files(directory.path(), "shards"), before);
}

#[test]
fn another_directory_is_refused_and_left_alone() {
    let (directory, job) = (folder(), job());
    std::fs::write(directory.path().join("thesis.tex"), "mine").unwrap();
    let error = job.begin(&disk(directory.path())).unwrap_err();
    assert!(error.to_string().contains("found thesis.tex; nothing was touched"), "{error}");
    assert!(matches!(probe(directory.path()), Err(Error::Foreign { .. })));
    assert!(!files(directory.path(), "").contains(&String::from("manifests")));
}

#[test]
fn a_newer_format_is_refused_and_a_newer_minor_one_is_read() {
    let (directory, job) = (folder(), job());
    let path = directory.path();
    job.begin(&disk(path)).unwrap();
    std::fs::write(path.join("FORMAT"), "lamina 1.7\n").unwrap();
    job.check(path, 0);
    std::fs::write(path.join("FORMAT"), "lamina 2.0\n").unwrap();
    for error in [Store::open(path, None).unwrap_err(), job.resume(&disk(path)).unwrap_err()] {
        assert!(error.to_string().contains("has format \"lamina 2.0\""), "{error}");
    }
    std::fs::remove_file(path.join("manifests/00000000000000000001.json")).unwrap();
    assert!(matches!(job.begin(&disk(path)), Err(Error::Newer { .. })));
}

/// Bytes of all events of `log` that begin like this.
fn bytes(log: &[String], verb: &str) -> u64 {
    let sizes = log.iter().filter_map(|event| event.strip_prefix(verb));
    sizes.map(|rest| rest.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn where_the_total_is_known_the_last_shard_is_laid_out_and_reserved_from_the_start() {
    let job = Job::new(&[vec![(40, 40)], vec![(50, 50)], vec![(7, 9)]], 64).with_total();
    let directory = folder();
    let (disk, events) = Watched::over(directory.path());
    let mut writer = job.begin(&disk).unwrap();
    let plan = writer.manifest().plan.clone();
    for window in 0..3 {
        job.append_all(&mut writer, window, window + 1);
    }
    writer.finish().unwrap();
    let log = events.lock().unwrap().log.clone();
    let reserved: Vec<&String> =
        log.iter().filter(|event| event.starts_with("reserve shards/filling.part")).collect();
    let room = |rows| plan.layout(&Size { rows, ..Size::default() }).unwrap().file_bytes;
    let expected = [64, 33].map(|rows| format!("reserve shards/filling.part {}", room(rows)));
    assert_eq!(reserved, expected.iter().collect::<Vec<_>>());
    assert!(!log.iter().any(|event| event.contains("piece.part")), "{log:?}");
    let renamed = log.iter().filter(|event| event.starts_with("rename shards/filling.part"));
    assert_eq!(renamed.count(), 2);
    job.check(directory.path(), 3);
}

#[test]
fn a_row_is_written_at_most_twice_and_three_times_at_a_writers_end() {
    let windows: Vec<Vec<(u64, u64)>> = (0..40).map(|_| vec![(500, 500)]).collect();
    let tables = |log: &[String]| bytes(log, "write shards/filling-prompt");
    for (total, times) in [(true, 2), (false, 3)] {
        let mut job = Job::new(&windows, 32_768);
        job.total = total;
        let directory = folder();
        let (disk, events) = Watched::over(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        for window in 0..40 {
            job.append_all(&mut writer, window, window + 1);
            writer.commit().unwrap();
        }
        writer.finish().unwrap();
        let log = events.lock().unwrap().log.clone();
        let rows = job.all().rows() * ROW_BYTES;
        let written = bytes(&log, "write shards/filling.part") + bytes(&log, "write shards/piece");
        // Headers, prompts and checksums of 41 shards come on top.
        let more = 42 * (writer.manifest().plan.header_bytes() + 2048) + 3 * tables(&log);
        assert!(written > (times - 1) * rows, "{written} bytes for {rows}");
        assert!(written < times * rows + more, "{written} bytes for {rows}");
    }
}

#[test]
fn lengths_and_ids_of_the_shard_being_filled_wait_in_a_file() {
    let job = Job::new(&[vec![(1, 3000)], vec![(1, 2000)]], 64);
    let directory = folder();
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 2);
    let size = |name: &str| std::fs::metadata(directory.path().join("shards").join(name)).unwrap();
    assert_eq!(size("filling-prompt-ids.part").len(), 4 * 5000);
    assert_eq!(size("filling-prompt-length.part").len(), 8 * 2);
    writer.close();
    assert_eq!(files(directory.path(), "shards"), [""; 0]);
}

#[test]
fn finishing_removes_the_spool() {
    let (directory, job) = (folder(), job());
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    std::fs::create_dir(directory.path().join("spool")).unwrap();
    std::fs::write(directory.path().join("spool/ids"), "1").unwrap();
    job.append_all(&mut writer, 0, 4);
    writer.commit().unwrap();
    assert_eq!(files(directory.path(), "spool"), ["ids"]);
    writer.finish().unwrap();
    assert!(!directory.path().join("spool").exists());
}

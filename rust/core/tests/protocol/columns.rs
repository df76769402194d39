//! Rules 5, 9 and 13: what readers see while writers go on, and how columns are mapped.

use std::path::Path;

use lamina_core::{Error, Store};

use crate::support::{Job, disk, folder, read};
use crate::tools::{newest, region};

/// Returns how many writable private mappings of this file the process has.
fn exported_mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name) && line.contains(" rw-p ")).count()
}

#[test]
fn full_shards_and_the_first_piece_are_mapped_and_later_pieces_copied() {
    let job = Job::new(&[vec![(4096, 4096)], vec![(100, 100)], vec![(50, 50)]], 4096);
    let directory = folder();
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    for window in 0..3 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    let manifest = newest(directory.path());
    assert_eq!(manifest.shards.iter().map(|s| s.rows).collect::<Vec<_>>(), [4096, 100, 50]);
    let store = Store::open(directory.path(), None).unwrap();
    let column = store.column(1).unwrap();
    let mapped = manifest.shards.iter().map(|shard| exported_mappings(&shard.file_name()));
    assert_eq!(mapped.collect::<Vec<_>>(), [1, 1, 0]);
    // Congruent to the file, so that the kernel can use 2 MiB pages.
    let offset = usize::try_from(region(&manifest, 0, 1)).unwrap();
    assert_eq!(column.as_ptr().addr() % (2 << 20), offset % (2 << 20));
    job.check(directory.path(), 3);
}

fn begin_anew(path: &Path, job: &Job) {
    for folder in ["manifests", "shards"] {
        std::fs::remove_dir_all(path.join(folder)).unwrap();
    }
    std::fs::remove_file(path.join("FORMAT")).unwrap();
    let mut writer = job.begin(&disk(path)).unwrap();
    for window in 0..job.windows.len() {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
}

#[test]
fn a_store_created_anew_under_a_reader_is_an_error_and_not_other_numbers() {
    let directory = folder();
    let job = Job::new(&[vec![(5, 5)], vec![(6, 6)]], 8);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 2);
    writer.commit().unwrap();
    drop(writer);
    let store = Store::open(directory.path(), None).unwrap();
    let other = Job::new(&[vec![(9, 9)], vec![(3, 3)], vec![(8, 8)], vec![(2, 2)]], 8);
    begin_anew(directory.path(), &other);
    assert!(newest(directory.path()).version > store.manifest().version);
    let error = store.column(0).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(error.to_string().contains("although version 2 names it"), "{error}");
    assert!(store.newer().unwrap().is_none());
}

#[test]
fn a_reader_whose_pieces_were_replaced_reads_the_same_rows_from_a_newer_version() {
    let directory = folder();
    let job = Job::new(&[vec![(5, 5)], vec![(2, 2), (1, 4)], vec![(6, 6)], vec![(9, 9)]], 8);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    for window in 0..2 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    let store = Store::open(directory.path(), None).unwrap();
    for window in 2..4 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    writer.finish().unwrap();
    let piece = store.manifest().shards[0].file_name();
    assert!(!directory.path().join("shards").join(piece).exists());
    let (data, _) = read(&store).unwrap();
    assert_eq!(data.columns, job.upto[2].columns, "its own row count, the same numbers");
    assert_eq!(data.prompt_rows, job.upto[2].prompt_rows);
    job.compare(&store.newer().unwrap().unwrap(), 4).unwrap();
}

#[test]
fn a_missing_shard_of_the_newest_version_is_an_error_that_names_it() {
    let directory = folder();
    let job = Job::new(&[vec![(5, 5)]], 8);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    let name = newest(directory.path()).shards[0].file_name();
    std::fs::remove_file(directory.path().join("shards").join(&name)).unwrap();
    let error = Store::open(directory.path(), None).unwrap().column(0).unwrap_err().to_string();
    assert!(error.contains(&name) && error.contains("rows 0..5 of prompts 0..1"), "{error}");
}

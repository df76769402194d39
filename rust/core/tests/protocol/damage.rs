//! Rule 2: bytes that were read back are checked before they are written anywhere again.

use std::os::unix::fs::FileExt;
use std::path::Path;

use lamina_core::layout::Tensor;
use lamina_core::{Error, Store};

use crate::support::{Job, disk, folder, verify};
use crate::tools::{files, flip, newest, region, shard_path};

/// One window of two prompts, another of one that spans shards; eight rows a shard.
fn job() -> Job {
    Job::new(&[vec![(3, 3), (2, 6)], vec![(7, 7)], vec![(3, 3)]], 8)
}

fn flip_in_place(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_piece_with_a_flipped_bit_ends_the_resume_and_names_its_rows() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    for window in 0..2 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    drop(writer);
    // One full shard, and a piece of rows 8..12.
    let manifest = newest(directory.path());
    assert_eq!(manifest.shards.iter().map(|shard| shard.rows).collect::<Vec<_>>(), [8, 4]);
    let layout = manifest.plan.layout(&manifest.shards[1].size()).unwrap();
    let path = shard_path(directory.path(), &manifest.shards[1]);
    let intact = std::fs::read(&path).unwrap();
    for region in layout.checked().filter(|region| region.bytes > 0) {
        if matches!(region.tensor, Tensor::Pad(_)) {
            continue;
        }
        flip(&path, region.offset);
        let error = job.resume(&disk).unwrap_err();
        assert!(matches!(&error, Error::Damaged { .. }), "{region:?}: {error}");
        let text = error.to_string();
        assert!(text.contains("rows 8..12 of prompts 2..3"), "{region:?}: {text}");
        std::fs::write(&path, &intact).unwrap();
    }
    assert_eq!(newest(directory.path()).version, manifest.version);
    let mut writer = job.resume(&disk).unwrap();
    job.append_all(&mut writer, 2, 3);
    writer.finish().unwrap();
    job.check(directory.path(), 3);
}

#[test]
fn a_bit_flipped_in_the_shard_being_filled_ends_the_commit_and_names_its_rows() {
    let job = Job::new(&[vec![(8, 8), (4, 4)]], 8);
    for file in ["filling.part", "filling-prompt-rows.part", "filling-prompt-ids.part"] {
        let directory = folder();
        let disk = disk(directory.path());
        let mut writer = job.begin(&disk).unwrap();
        job.append_all(&mut writer, 0, 1);
        let first_site = writer.manifest().plan.header_bytes();
        let offset = if file == "filling.part" { first_site } else { 0 };
        flip_in_place(&directory.path().join("shards").join(file), offset);
        let error = writer.commit().unwrap_err();
        assert!(matches!(&error, Error::Damaged { .. }), "{file}: {error}");
        let text = error.to_string();
        assert!(text.contains("rows 8..12 of prompts 0..2"), "{file}: {text}");
        assert!(text.contains("the disk or the memory is faulty"), "{file}: {text}");
        assert!(matches!(job.append(&mut writer, 0), Err(Error::Closed { .. })));
        assert_eq!(newest(directory.path()).version, 1);
    }
}

#[test]
fn damage_of_a_full_shard_before_it_is_sealed_is_found_by_verify() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 1);
    let offset = writer.manifest().plan.header_bytes();
    flip_in_place(&directory.path().join("shards/filling.part"), offset);
    job.append_all(&mut writer, 1, 3);
    writer.finish().unwrap();
    let store = Store::open(directory.path(), None).unwrap();
    let damages = store.verify(1, &mut |_, _| true).unwrap();
    assert_eq!(damages.len(), 1);
    assert_eq!(damages[0].place.rows, (0, 8));
}

#[test]
fn every_flipped_bit_of_a_store_is_found() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), job());
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 3);
    writer.finish().unwrap();
    let manifest = newest(directory.path());
    for (index, entry) in manifest.shards.iter().enumerate() {
        let path = shard_path(directory.path(), entry);
        let intact = std::fs::read(&path).unwrap();
        let rows = region(&manifest, index, 0);
        for at in (0..rows).step_by(97).chain((rows..intact.len() as u64).step_by(7)) {
            flip(&path, at);
            let store = Store::open(directory.path(), None).unwrap();
            assert!(verify(&store).is_err(), "byte {at} of shard {index}");
            std::fs::write(&path, &intact).unwrap();
        }
    }
    job.check(directory.path(), 3);
    assert_eq!(files(directory.path(), "shards").len(), 2);
}

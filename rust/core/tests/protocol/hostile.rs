//! Files that somebody made on purpose: errors, no panic, no memory beyond the file's size.

use std::os::unix::fs::symlink;
use std::path::Path;

use lamina_core::checksum::{self, Running};
use lamina_core::layout::Layout;
use lamina_core::manifest::Manifest;
use lamina_core::side::Side;
use lamina_core::{Error, Store};
use rustix::fs::{CWD, FileType, Mode};

use crate::support::{Job, disk, folder, read, verify};
use crate::tools::{manifest_path, newest, shard_path};

/// A complete store of one full and one short shard, at version 2.
fn job() -> Job {
    Job::new(&[vec![(3, 3), (7, 8), (0, 2)]], 8)
}

fn store_at(path: &Path) -> Manifest {
    let job = job();
    let mut writer = job.begin(&disk(path)).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    newest(path)
}

/// Everything that reads a store, and a writer that goes on with it: all may fail, none may panic.
fn try_everything(path: &Path) -> Vec<String> {
    let mut errors = Vec::new();
    match Store::open(path, None) {
        Ok(store) => {
            errors.extend(read(&store).err());
            errors.extend(verify(&store).err());
            for prompt in 0..3 {
                errors.extend(store.prompt_ids(prompt).err().map(|error| error.to_string()));
                errors.extend(store.prompt_text(prompt).err().map(|error| error.to_string()));
                let found = store.locate(&[prompt; 4], &[0, 2, i64::MAX, -1]);
                errors.extend(found.err().map(|error| error.to_string()));
            }
        }
        Err(error) => errors.push(error.to_string()),
    }
    let job = job();
    match job.resume(&disk(path)) {
        Ok(mut writer) => errors.extend(
            job.append(&mut writer, 0)
                .and_then(|_| writer.commit())
                .and_then(|()| writer.finish())
                .err()
                .map(|error| error.to_string()),
        ),
        Err(error) => errors.push(error.to_string()),
    }
    errors
}

/// Writes this manifest as the newest version, with its checksum.
fn write_manifest(path: &Path, manifest: &Manifest) {
    std::fs::write(manifest_path(path, manifest.version), manifest.encode().unwrap()).unwrap();
}

/// Changes the bytes of a shard and makes all checksums, its name and the manifest fit.
fn forge(path: &Path, shard: usize, change: impl FnOnce(&mut Vec<u8>, &Layout)) {
    let mut manifest = newest(path);
    let layout = manifest.plan.layout(&manifest.shards[shard].size()).unwrap();
    let old = shard_path(path, &manifest.shards[shard]);
    let mut bytes = std::fs::read(&old).unwrap();
    change(&mut bytes, &layout);
    let range = |offset: u64, length: u64| {
        usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap()
    };
    let (mut crcs, mut hashes) = (Vec::new(), Vec::new());
    for region in layout.checked() {
        let mut running = Running::new(region.block_bytes);
        running.update(&bytes[range(region.offset, region.bytes)]);
        crcs.extend(running.blocks().flat_map(u32::to_le_bytes));
        hashes.extend(running.xxh3().into_iter().flat_map(u64::to_le_bytes));
    }
    for (side, table) in [(Side::Crc32c, crcs), (Side::Xxh3, hashes)] {
        let region = layout.side(side).unwrap();
        bytes[range(region.offset, region.bytes)].copy_from_slice(&table);
    }
    let tables = usize::try_from(layout.side(Side::Crc32c).unwrap().offset).unwrap();
    let header = &bytes[range(0, layout.header_bytes)];
    manifest.shards[shard].name = checksum::name([header, &bytes[tables..]]);
    std::fs::remove_file(old).unwrap();
    std::fs::write(shard_path(path, &manifest.shards[shard]), &bytes).unwrap();
    write_manifest(path, &manifest);
}

fn put(bytes: &mut [u8], layout: &Layout, side: Side, index: u64, value: u64) {
    let at = usize::try_from(layout.side(side).unwrap().offset + 8 * index).unwrap();
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_forged_store_with_honest_numbers_is_read() {
    let directory = folder();
    store_at(directory.path());
    forge(directory.path(), 0, |_, _| {});
    job().check(directory.path(), 1);
}

#[test]
fn prompt_tables_with_wild_numbers_are_errors() {
    for side in [Side::PromptRows, Side::PromptLength, Side::PromptTextLength] {
        for value in [u64::MAX, u64::MAX / 2, 1 << 60, 1 << 32, 0] {
            for index in [0, 1] {
                let directory = folder();
                store_at(directory.path());
                forge(directory.path(), 0, |bytes, layout| put(bytes, layout, side, index, value));
                let errors = try_everything(directory.path());
                assert!(!errors.is_empty(), "{side:?} {index} {value}");
            }
        }
    }
}

#[test]
fn a_header_that_is_not_the_canonical_one_moves_no_reads() {
    let directory = folder();
    store_at(directory.path());
    forge(directory.path(), 0, |bytes, _| {
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        bytes[8..4000].fill(b'[');
    });
    let store = Store::open(directory.path(), None).unwrap();
    let (data, _) = read(&store).unwrap();
    assert_eq!(data.columns, job().all().columns, "offsets come from the manifest");
    let error = verify(&store).unwrap_err();
    assert!(error.contains("not the header that the manifest's numbers give"), "{error}");
}

#[test]
fn manifests_with_wild_numbers_are_errors() {
    type Change = fn(&mut Manifest);
    let changes: [Change; 12] = [
        |manifest| manifest.shards[0].ids = u64::MAX,
        |manifest| manifest.shards[0].ids = 1 << 60,
        |manifest| manifest.shards[0].text_bytes = u64::MAX,
        |manifest| manifest.shards[0].prompts = u64::MAX,
        |manifest| manifest.shards[1].prompts = 1 << 61,
        |manifest| manifest.shards[1].rows = 1 << 40,
        |manifest| manifest.shards[1].head = u64::MAX,
        |manifest| manifest.windows = u64::MAX,
        |manifest| manifest.shards[0].counts = vec![[0, u64::MAX, u64::MAX, 1]],
        |manifest| manifest.shards[0].counts = vec![[u64::MAX, 1, 1, 1]],
        |manifest| manifest.shards[1].name = String::from("../../../../etc/passwd0123456789"),
        |manifest| manifest.shards.reverse(),
    ];
    for (index, change) in changes.iter().enumerate() {
        let directory = folder();
        let mut manifest = store_at(directory.path());
        change(&mut manifest);
        write_manifest(directory.path(), &manifest);
        assert!(!try_everything(directory.path()).is_empty(), "change {index}");
    }
}

#[test]
fn versions_that_cannot_be_counted_on_from_are_foreign_names() {
    let directory = folder();
    let manifest = store_at(directory.path());
    for version in [0, u64::MAX, u64::MAX - 1] {
        write_manifest(directory.path(), &Manifest { version, ..manifest.clone() });
    }
    assert_eq!(try_everything(directory.path()), [""; 0]);
    assert_eq!(Store::open(directory.path(), None).unwrap().manifest().version, 4);
}

#[test]
fn links_are_not_followed() {
    type Which = fn(&Path, &Manifest) -> std::path::PathBuf;
    let cases: [(Which, &str); 5] = [
        (|path, manifest| shard_path(path, &manifest.shards[1]), "it is a symbolic link"),
        (|path, _| manifest_path(path, 2), "it is a symbolic link"),
        (|path, _| path.join("FORMAT"), "it is a symbolic link"),
        (|path, _| path.join("shards"), "cannot open"),
        (|path, _| path.join("manifests"), "cannot open"),
    ];
    for (which, expected) in cases {
        let (directory, outside) = (folder(), folder());
        let manifest = store_at(directory.path());
        let (path, target) = (which(directory.path(), &manifest), outside.path().join("target"));
        std::fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        let errors = try_everything(directory.path());
        assert!(errors.len() > 1, "{path:?}: readers and writers: {errors:?}");
        assert!(errors.iter().all(|error| error.contains(expected)), "{path:?}: {errors:?}");
    }
}

#[test]
fn pipes_and_folders_in_place_of_files_neither_block_nor_panic() {
    for folder_instead in [false, true] {
        for which in 0..5 {
            let directory = folder();
            let manifest = store_at(directory.path());
            let path = match which {
                0 => shard_path(directory.path(), &manifest.shards[1]),
                1 => manifest_path(directory.path(), 2),
                2 => directory.path().join("FORMAT"),
                3 => directory.path().join("LOCK"),
                _ => directory.path().join("OWNER"),
            };
            let _ = std::fs::remove_file(&path);
            if folder_instead {
                std::fs::create_dir(&path).unwrap();
            } else {
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
            }
            let reads = Store::open(directory.path(), None).map(|store| verify(&store));
            assert_eq!(matches!(reads, Ok(Ok(()))), which >= 3, "{path:?}");
            if which < 3 {
                assert!(job().resume(&disk(directory.path())).is_err(), "{path:?}");
            } else {
                let _ = disk(directory.path()).lock();
            }
        }
    }
}

fn make_sparse(path: &Path, bytes: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

#[test]
fn huge_sparse_files_are_refused_by_their_size() {
    let directory = folder();
    let manifest = store_at(directory.path());
    let format = directory.path().join("FORMAT");
    make_sparse(&format, 1 << 42);
    assert_eq!(try_everything(directory.path()), [""; 0], "only its beginning is read");
    let shard = shard_path(directory.path(), &manifest.shards[0]);
    make_sparse(&shard, 1 << 42);
    let error = Store::open(directory.path(), None).unwrap().column(0).unwrap_err();
    assert!(error.to_string().contains("it has 4398046511104 bytes, not"), "{error}");
    let newest = manifest_path(directory.path(), newest(directory.path()).version);
    make_sparse(&newest, 1 << 42);
    let error = Store::open(directory.path(), None).unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{error}");
    assert!(error.to_string().contains("it has 4398046511104 bytes, more than"), "{error}");
    let before = error.to_string().contains("open it with version=");
    assert!(before, "{error}");
}

#[test]
fn owner_files_of_any_content_are_quoted_shortened_or_left_out() {
    let directory = folder();
    let lock = disk(directory.path()).lock().unwrap();
    let long = "x".repeat(1 << 20);
    for content in [&b"\xff\xfe"[..], b"", long.as_bytes(), b"\n\n"] {
        std::fs::write(directory.path().join("OWNER"), content).unwrap();
        let text = disk(directory.path()).lock().unwrap_err().to_string();
        assert!(text.contains("is in use by"), "{text}");
        assert!(text.len() < 1000, "{} bytes", text.len());
    }
    drop(lock);
}

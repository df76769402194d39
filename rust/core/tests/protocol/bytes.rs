//! Rules 1, 8, 9 and 10: names, headers, regions, R.

use std::os::unix::fs::MetadataExt;

use lamina_core::checksum::crc32c;
use lamina_core::dtype::Dtype;
use lamina_core::layout::{MAX_ROWS, Plan, SHARD_BYTES, SiteSpec, rows_per_shard};
use lamina_core::{Error, Store};
use safetensors::SafeTensors;

use crate::support::{Job, ROW_BYTES, disk, folder, read};
use crate::tools::{files, flip, newest, shard_path};

/// Differences that no CRC32C sees: the polynomial itself.
const UNSEEN: [u8; 8] = ((0x82f6_3b78_u64 << 1) | 1).to_le_bytes();

#[test]
fn contents_whose_crcs_agree_have_different_names() {
    let job = Job::new(&[vec![(16, 16)]], 16);
    let mut other = job.clone();
    for (byte, change) in other.windows[0].columns[1].iter_mut().zip(UNSEEN) {
        *byte ^= change;
    }
    let [first, second] = [&job, &other].map(|job| &job.windows[0].columns[1]);
    assert_ne!(first, second);
    assert_eq!(crc32c(0, first), crc32c(0, second));
    assert_ne!(job.names(), other.names());
}

#[test]
fn damage_that_no_crc_sees_is_found_by_verify() {
    let directory = folder();
    let job = Job::new(&[vec![(16, 16)]], 16);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    let manifest = newest(directory.path());
    let layout = manifest.plan.layout(&manifest.shards[0].size()).unwrap();
    let path = shard_path(directory.path(), &manifest.shards[0]);
    let mut bytes = std::fs::read(&path).unwrap();
    let from = usize::try_from(layout.site(1).unwrap().offset).unwrap();
    for (byte, change) in bytes[from..].iter_mut().zip(UNSEEN) {
        *byte ^= change;
    }
    std::fs::write(&path, bytes).unwrap();
    let damages = Store::open(directory.path(), None).unwrap().verify(1, &mut |_, _| true).unwrap();
    assert_eq!(damages.len(), 1);
    assert!(damages[0].found.contains("XXH3-128 differs"), "{}", damages[0].found);
}

/// Leaves a full shard as a piece, so that sealing it makes the same name again.
fn sealed_twice(spoil: bool) -> (u64, u64) {
    let directory = folder();
    let job = Job::new(&[vec![(4, 4)], vec![(2, 2)]], 4);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.commit().unwrap();
    let entry = newest(directory.path()).shards[0].clone();
    assert_eq!(entry.rows, 4);
    let path = shard_path(directory.path(), &entry);
    let before = std::fs::metadata(&path).unwrap().ino();
    if spoil {
        flip(&path, writer.manifest().plan.header_bytes());
    }
    job.append_all(&mut writer, 1, 2);
    writer.finish().unwrap();
    assert_eq!(newest(directory.path()).shards[0], entry);
    job.check(directory.path(), 2);
    (before, std::fs::metadata(&path).unwrap().ino())
}

#[test]
fn an_intact_shard_of_the_same_name_is_used() {
    let (before, after) = sealed_twice(false);
    assert_eq!(before, after);
}

#[test]
fn a_damaged_shard_of_the_same_name_is_replaced() {
    let (before, after) = sealed_twice(true);
    assert_ne!(before, after);
}

fn bf16(count: usize) -> Vec<SiteSpec> {
    let site = |layer| SiteSpec {
        path: format!("model.layers[{layer}].output"),
        dtype: Dtype::Bf16,
        shape: vec![576],
    };
    (0..count).map(site).collect()
}

#[test]
fn a_header_takes_what_its_sites_may_need_whatever_the_numbers() {
    let plan = |count| Plan::new(bf16(count), 16_384, false).unwrap();
    assert_eq!(plan(30).header_bytes(), 12 << 10);
    let many = plan(10_000).header_bytes();
    assert!((2_700_000..2_900_000).contains(&many), "{many}");

    let directory = folder();
    let job = Job::new(&[vec![(9, 9), (0, 3)], vec![(1, 200)]], 4);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    for window in 0..2 {
        job.append_all(&mut writer, window, window + 1);
        writer.commit().unwrap();
    }
    let manifest = newest(directory.path());
    assert!(manifest.shards.len() > 3);
    for entry in &manifest.shards {
        let bytes = std::fs::read(shard_path(directory.path(), entry)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(8 + length, manifest.plan.header_bytes());
        assert_eq!((8 + length) % 4096, 0);
        let header = &bytes[8..8 + usize::try_from(length).unwrap()];
        let text = std::str::from_utf8(header).unwrap();
        let json = text.trim_end_matches(' ');
        // The one space is that of the metadata.
        assert!(json.matches(' ').count() == 1 && json.ends_with('}'), "{json}");
        // In the order of the file, and nothing but the format's number in the metadata.
        let head = format!(r#"{{"__metadata__":{{"format":"lamina 1","head":"{}"}},"#, entry.head);
        assert!(json.starts_with(&head), "{json}");
        let layout = manifest.plan.layout(&entry.size()).unwrap();
        let mut rest = json;
        for region in &layout.regions {
            let begin = region.offset - layout.header_bytes;
            let span = format!(r#""data_offsets":[{begin},{}]"#, begin + region.bytes);
            let at = rest.find(&span).unwrap();
            rest = &rest[at + span.len()..];
        }
    }
}

#[test]
fn every_shard_opens_with_safetensors_and_holds_the_column() {
    let directory = folder();
    let job = Job::new(&[vec![(9, 9), (0, 3)], vec![(1, 200)]], 4);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 2);
    writer.finish().unwrap();
    let (data, _) = read(&Store::open(directory.path(), None).unwrap()).unwrap();
    let mut columns = [Vec::new(), Vec::new()];
    for entry in newest(directory.path()).shards {
        let bytes = std::fs::read(shard_path(directory.path(), &entry)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (column, path) in columns.iter_mut().zip(["model.a.output", "model.b.output"]) {
            column.extend_from_slice(tensors.tensor(path).unwrap().data());
        }
    }
    assert_eq!(columns, data.columns);
}

#[test]
fn header_and_tables_are_checked_against_the_name_at_first_use() {
    let directory = folder();
    let job = Job::new(&[vec![(4, 4)]], 4);
    let mut writer = job.begin(&disk(directory.path())).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    let manifest = newest(directory.path());
    let path = shard_path(directory.path(), &manifest.shards[0]);
    let intact = std::fs::read(&path).unwrap();
    // In the length, the JSON, the spaces, and the last byte of the tables.
    for at in [0, 40, manifest.plan.header_bytes() - 1, intact.len() as u64 - 1] {
        flip(&path, at);
        let store = Store::open(directory.path(), None).unwrap();
        let error = store.column(0).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "byte {at}: {error}");
        assert!(store.prompt_rows(0, 1).is_err());
        std::fs::write(&path, &intact).unwrap();
    }
    std::fs::write(&path, &intact[..intact.len() - 1]).unwrap();
    let error = Store::open(directory.path(), None).unwrap().column(0).unwrap_err();
    assert!(error.to_string().contains("bytes, not"), "{error}");
    assert_eq!(files(directory.path(), "shards").len(), 1);
}

#[test]
fn regions_of_full_shards_begin_at_multiples_of_their_tier_and_of_short_ones_at_pages() {
    let site = |path: &str, shape| SiteSpec { path: path.into(), dtype: Dtype::U8, shape };
    let sites = vec![
        site("copy", vec![3]),
        site("page", vec![1]),
        site("large", vec![16]),
        site("huge", vec![512]),
    ];
    for (rows, tiers) in
        [(4096, ["4 KiB", "4 KiB", "64 KiB", "2 MiB"]), (1024, ["copy", "copy", "4 KiB", "64 KiB"])]
    {
        let plan = Plan::new(sites.clone(), rows, false).unwrap();
        let sized =
            |rows, prompts| lamina_core::layout::Size { rows, prompts, ..Default::default() };
        let (one, two) =
            (plan.layout(&sized(rows, 1)).unwrap(), plan.layout(&sized(rows, 999)).unwrap());
        let short = plan.layout(&sized(rows - 1, 1)).unwrap();
        for (index, expected) in tiers.iter().enumerate() {
            let tier = plan.tier(index).name();
            assert_eq!(tier, *expected, "site {index} of {rows} rows");
            let multiple = if tier == "copy" || tier == "4 KiB" { 4096 } else { 65536 };
            assert_eq!(one.site(index).unwrap().offset % multiple, 0);
            assert_eq!(one.site(index), two.site(index), "the same in every full shard");
            assert_eq!(short.site(index).unwrap().offset % 4096, 0);
        }
    }
}

#[test]
fn rows_of_a_shard_are_a_power_of_two_that_counts_the_row_tables() {
    let sites = crate::support::sites();
    assert_eq!(rows_per_shard(&sites, 8 * ROW_BYTES).unwrap(), 8);
    assert_eq!(rows_per_shard(&sites, 8 * ROW_BYTES - 1).unwrap(), 4);
    assert_eq!(rows_per_shard(&sites, SHARD_BYTES).unwrap(), MAX_ROWS);
    assert_eq!(MAX_ROWS, 1 << 20);
    assert!(Plan::new(sites, 2 * MAX_ROWS, false).is_err());
}

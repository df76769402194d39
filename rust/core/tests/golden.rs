//! Stores that were made when the format was (`tests/golden/make.py`), read by the core of today
//! and by the `safetensors` crate.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::{Path, PathBuf};

use lamina_core::dtype::Dtype;
use lamina_core::{PromptRows, Store};
use safetensors::SafeTensors;

const STORES: [&str; 4] = ["dtypes", "pieces", "prompts", "tiny"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v1").join(name)
}

fn open(name: &str) -> Store {
    Store::open(&path(name), None).unwrap()
}

/// The bytes of the first rows of a site: byte i of a column is this function of i.
fn made(site: u64, bytes: u64, dtype: Dtype) -> Vec<u8> {
    (0..bytes)
        .map(|at| {
            let byte = (at * 7 + at / 5 + site * 13).to_le_bytes()[0];
            if dtype == Dtype::Bool { byte & 1 } else { byte }
        })
        .collect()
}

fn column(store: &Store, site: usize) -> Vec<u8> {
    let map = store.column(site).unwrap();
    let mut bytes = vec![0; map.len()];
    map.copy_to(0, &mut bytes).unwrap();
    bytes
}

fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&chunk| u32::from_le_bytes(chunk)).collect()
}

#[test]
fn golden_stores_are_intact_at_both_versions() {
    for name in STORES {
        let newest = open(name);
        let before = Store::open(&path(name), Some(newest.manifest().version - 1)).unwrap();
        assert_eq!(before.manifest().store, newest.manifest().store);
        for store in [newest, before] {
            assert_eq!(store.verify(2, &mut |_, _| true).unwrap(), [], "{name}");
        }
    }
}

#[test]
fn golden_numbers_are_those_that_were_stored() {
    for name in ["dtypes", "pieces", "prompts"] {
        let store = open(name);
        for (site, spec) in store.plan().sites().iter().enumerate() {
            let bytes = store.rows() * spec.row_bytes().unwrap();
            let expected = made(site as u64, bytes, spec.dtype);
            assert_eq!(column(&store, site), expected, "{name} {}", spec.path);
            let rows: Vec<i64> = (0..i64::try_from(store.rows()).unwrap()).collect();
            let mut gathered = vec![0; expected.len()];
            let row_bytes = expected.len() / rows.len();
            store.gather(site, &rows, &mut gathered, (0, row_bytes), true).unwrap();
            assert_eq!(gathered, expected, "{name} {}", spec.path);
        }
    }
    let expected: Vec<u8> =
        [1.0f32, 1.5, 2.0, -2.5, 3.0, 0.0].iter().flat_map(|number| number.to_le_bytes()).collect();
    assert_eq!(column(&open("tiny"), 0), expected);
}

#[test]
fn every_dtype_is_in_a_golden_store() {
    let store = open("dtypes");
    let mut found: Vec<Dtype> = store.plan().sites().iter().map(|site| site.dtype).collect();
    found.sort_unstable();
    found.dedup();
    assert_eq!(found, Dtype::all().collect::<Vec<_>>());
    assert!(store.plan().sites().iter().any(|site| site.shape.is_empty()));
    assert!(store.plan().sites().iter().any(|site| site.path == r#"model.blöcke."a\b".output"#));
}

#[test]
fn golden_prompts_are_those_that_were_stored() {
    let store = open("prompts");
    let lengths = [0, 3, 0, 2, 1, 2, 0, 10, 0, 1, 0, 0];
    assert_eq!(store.prompts(), 12);
    let mut start = 0;
    for (index, length) in (0u32..).zip(lengths) {
        let prompt = u64::from(index);
        let expected = PromptRows { start, rows: length, length };
        assert_eq!(store.prompt_rows(prompt, prompt + 1).unwrap(), [expected]);
        let ids: Vec<u32> = (100 * index..).take(usize::try_from(length).unwrap()).collect();
        assert_eq!(u32s(&store.prompt_ids(i64::from(index)).unwrap()), ids);
        let text = match index % 6 {
            0 | 4 => format!("prompt {index}"),
            1 | 3 => format!("prompt {index} Größe ✓"),
            _ => String::new(),
        };
        assert_eq!(store.prompt_text(i64::from(index)).unwrap(), Some(text));
        for at in start..start + length {
            let row = i64::try_from(at).unwrap();
            let position = i64::try_from(at - start).unwrap();
            assert_eq!(store.prompts_of(&[row]).unwrap(), [i64::from(index)]);
            assert_eq!(store.locate(&[i64::from(index)], &[position]).unwrap(), [row]);
        }
        start += length;
    }
    let [_, _, flags] = store.row_tables(0, 19).unwrap();
    assert_eq!(flags, [[0; 18].as_slice(), &[1]].concat());
}

#[test]
fn golden_pieces_hold_the_last_four_tokens_of_each_prompt() {
    let store = open("pieces");
    assert!(!store.manifest().complete);
    let heads: Vec<u64> = store.manifest().shards.iter().map(|shard| shard.head).collect();
    assert_eq!(heads, [0, 1, 0]);
    let [_, positions, _] = store.row_tables(0, 16).unwrap();
    assert_eq!(u32s(&positions), [2, 3, 4, 5, 0, 5, 6, 7, 8, 0, 1, 2, 1, 2, 3, 4]);
}

#[test]
fn golden_shards_are_safetensors_files_that_equal_the_columns() {
    for name in STORES {
        let store = open(name);
        let mut row = 0;
        for entry in &store.manifest().shards {
            let bytes = std::fs::read(path(name).join("shards").join(entry.file_name())).unwrap();
            let shard = SafeTensors::deserialize(&bytes).unwrap();
            for (site, spec) in store.plan().sites().iter().enumerate() {
                let tensor = shard.tensor(&spec.path).unwrap();
                let shape: Vec<u64> = tensor.shape().iter().map(|&length| length as u64).collect();
                assert_eq!(shape, [&[entry.rows], spec.shape.as_slice()].concat());
                assert_eq!(format!("{}", tensor.dtype()), spec.dtype.safetensors());
                let from = usize::try_from(row * spec.row_bytes().unwrap()).unwrap();
                let expected = &column(&store, site)[from..from + tensor.data().len()];
                assert_eq!(tensor.data(), expected, "{name} {}", spec.path);
            }
            let ids = shard.tensor("#prompt.ids").unwrap();
            assert_eq!(ids.shape().iter().product::<usize>() as u64, entry.ids);
            assert_eq!(shard.tensor("#row.flags").unwrap().shape().len(), 1);
            row += entry.rows;
        }
        assert_eq!(row, store.rows());
    }
}

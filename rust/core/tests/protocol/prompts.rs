//! Rule 7: in which shard a prompt lies, and what its table says.

use lamina_core::layout::Tensor;
use lamina_core::shard::{Shard, Start};
use lamina_core::side::Side;

use crate::support::{Job, disk, folder};
use crate::tools::newest;

/// Captures with four rows a shard, committing after the windows named, and returns rows,
/// prompts and head of each shard.
fn shards(windows: &[Vec<(u64, u64)>], commits: &[usize], finish: bool) -> Vec<(u64, u64, u64)> {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), Job::new(windows, 4));
    let mut writer = job.begin(&disk).unwrap();
    for window in 0..windows.len() {
        job.append_all(&mut writer, window, window + 1);
        if commits.contains(&window) {
            writer.commit().unwrap();
            job.check(directory.path(), window + 1);
        }
    }
    if finish {
        writer.finish().unwrap();
        job.check(directory.path(), windows.len());
    }
    newest(directory.path()).shards.iter().map(|s| (s.rows, s.prompts, s.head)).collect()
}

#[test]
fn a_prompt_lies_where_its_first_row_would_fall() {
    let prompts = [(4, 4), (0, 1), (4, 4), (0, 2), (0, 3)];
    // The second opens the next shard; the last two, at the very end, belong to the last.
    assert_eq!(shards(&[prompts.to_vec()], &[], true), [(4, 1, 0), (4, 4, 0)]);
    let one_by_one: Vec<_> = prompts.iter().map(|&prompt| vec![prompt]).collect();
    assert_eq!(shards(&one_by_one, &[], true), [(4, 1, 0), (4, 4, 0)]);
    assert_eq!(shards(&one_by_one, &[0, 1, 2, 3, 4], true), [(4, 1, 0), (4, 4, 0)]);
}

#[test]
fn a_prompt_that_spans_shards_is_in_the_first_and_is_counted_as_head_by_the_others() {
    assert_eq!(
        shards(&[vec![(1, 1), (10, 12), (2, 2)]], &[], true),
        [(4, 2, 0), (4, 0, 4), (4, 1, 3), (1, 0, 1)]
    );
}

#[test]
fn a_shard_may_hold_prompts_without_rows_and_nothing_else() {
    assert_eq!(shards(&[vec![(0, 1), (0, 2)]], &[], true), [(0, 2, 0)]);
    assert_eq!(shards(&[vec![(4, 4)], vec![(0, 2)]], &[0, 1], false), [(4, 1, 0), (0, 1, 0)]);
    assert_eq!(shards(&[vec![(4, 4)], vec![(0, 2)]], &[0, 1], true), [(4, 2, 0)]);
}

#[test]
fn a_piece_may_begin_inside_a_prompt() {
    assert_eq!(shards(&[vec![(6, 6)]], &[0], false), [(4, 1, 0), (2, 0, 2)]);
    assert_eq!(
        shards(&[vec![(6, 6)], vec![(1, 1)]], &[0, 1], false),
        [(4, 1, 0), (2, 0, 2), (1, 1, 0)]
    );
}

#[test]
fn tables_have_totals_over_all_shards_and_their_tensors_the_order_of_the_rule() {
    let directory = folder();
    let (disk, job) = (disk(directory.path()), Job::new(&[vec![(6, 9), (0, 2)]], 4));
    let mut writer = job.begin(&disk).unwrap();
    job.append_all(&mut writer, 0, 1);
    writer.finish().unwrap();
    let manifest = newest(directory.path());
    let open = |index: usize| {
        Shard::open(&*disk, &manifest.plan, &manifest.shards[index], Start::default()).unwrap()
    };
    assert_eq!(open(0).side_u64(Side::PromptRows).unwrap(), [6]);
    assert_eq!(open(0).side_u64(Side::PromptLength).unwrap(), [9]);
    assert_eq!(open(1).side_u64(Side::PromptLength).unwrap(), [2]);
    let last = open(1);
    let names: Vec<String> = last
        .layout()
        .regions
        .iter()
        .filter(|region| !matches!(region.tensor, Tensor::Pad(_)))
        .map(|region| last.region_name(region))
        .collect();
    assert_eq!(
        names,
        [
            "model.a.output",
            "model.b.output",
            "#row.token",
            "#row.position",
            "#row.flags",
            "#prompt.rows",
            "#prompt.length",
            "#prompt.ids",
            "#prompt.text_length",
            "#prompt.text",
            "#crc32c",
            "#xxh3",
        ]
    );
    for region in &last.layout().regions {
        if let Tensor::Side(side) = region.tensor {
            assert_eq!(region.offset % 8, 0, "{side:?}");
        }
    }
}

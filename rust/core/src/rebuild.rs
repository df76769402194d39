//! Reading short shards back into the shard being filled. Every byte is checked on the way, so
//! that damage is never written again under a fresh checksum.

use std::sync::Arc;

use crate::build::PromptRecord;
use crate::disk::Disk;
use crate::error::Result;
use crate::layout::Plan;
use crate::manifest::Entry;
use crate::shard::{Shard, Start};
use crate::side::Side;
use crate::store::MAX_SUM;

/// Prompts are handed on in chunks of at most this many, and of about this many bytes.
const CHUNK_PROMPTS: usize = 4096;
const CHUNK_BYTES: u64 = 1 << 20;

/// What was read, in order.
pub(crate) enum Step<'a> {
    /// The next bytes of a stream: sites, then tokens, positions, flags.
    Rows {
        /// The stream.
        stream: usize,
        /// Its bytes.
        bytes: &'a [u8],
    },
    /// All streams have this many more rows.
    Grow(u64),
    /// The next prompts.
    Prompts {
        /// The prompts.
        records: &'a [PromptRecord<'a>],
        /// Whether they begin where the shard being filled ends.
        boundary: bool,
    },
}

/// Reads `pieces`, which begin at row and prompt `start` of the store, in order.
pub(crate) fn from_pieces(
    disk: &dyn Disk,
    plan: &Arc<Plan>,
    pieces: &[Entry],
    mut start: Start,
    take: &mut dyn FnMut(Step<'_>) -> Result<()>,
) -> Result<()> {
    let first_row = start.row;
    for piece in pieces {
        let shard = Shard::open(disk, plan, piece, start)?;
        read_rows(&shard, plan, take)?;
        let first_start = start.row - first_row + piece.head;
        read_prompts(&shard, plan, first_start, take)?;
        start.row += piece.rows;
        start.prompt += piece.prompts;
    }
    Ok(())
}

fn read_rows(
    shard: &Shard,
    plan: &Plan,
    take: &mut dyn FnMut(Step<'_>) -> Result<()>,
) -> Result<()> {
    let sites = (0..plan.sites().len()).filter_map(|site| shard.layout().site(site));
    let tables = [Side::RowToken, Side::RowPosition, Side::RowFlags];
    let tables = tables.into_iter().filter_map(|side| shard.layout().side(side));
    for (stream, region) in sites.chain(tables).enumerate() {
        shard.read_checked(region, (0, region.bytes), &mut |bytes| {
            take(Step::Rows { stream, bytes })
        })?;
    }
    take(Step::Grow(shard.entry().rows))
}

fn read_prompts(
    shard: &Shard,
    plan: &Plan,
    first_start: u64,
    take: &mut dyn FnMut(Step<'_>) -> Result<()>,
) -> Result<()> {
    let rows = shard.side_u64(Side::PromptRows)?;
    let lengths = shard.side_u64(Side::PromptLength)?;
    let text_lengths = shard.side_u64(Side::PromptTextLength)?;
    let entry = shard.entry();
    let total =
        |values: &[u64]| values.iter().fold(0, |sum: u64, &value| sum.saturating_add(value));
    for (side, is_wrong) in [
        (Side::PromptRows, total(&rows) >= MAX_SUM),
        (Side::PromptLength, total(&lengths) != entry.ids),
        (Side::PromptTextLength, total(&text_lengths) != entry.text_bytes),
    ] {
        if is_wrong {
            return Err(shard.does_not_add_up(side));
        }
    }
    let mut start = first_start;
    let (mut next, mut ids_at, mut text_at) = (0, 0, 0);
    while next < rows.len() {
        let boundary = start >= plan.rows_per_shard();
        let (mut upto, mut chunk_start) = (next, start);
        let (mut ids, mut text) = (0, 0);
        while upto < rows.len()
            && upto - next < CHUNK_PROMPTS
            && ids + text < CHUNK_BYTES
            && (chunk_start >= plan.rows_per_shard()) == boundary
        {
            ids += 4 * lengths.get(upto).copied().unwrap_or(0);
            text += text_lengths.get(upto).copied().unwrap_or(0);
            chunk_start += rows.get(upto).copied().unwrap_or(0);
            upto += 1;
        }
        let id_bytes = shard.side_span(Side::PromptIds, (ids_at, ids_at + ids))?;
        let text_bytes = shard.side_span(Side::PromptText, (text_at, text_at + text))?;
        let (mut id_rest, mut text_rest) = (id_bytes.as_slice(), text_bytes.as_slice());
        let mut records = Vec::with_capacity(upto - next);
        for index in next..upto {
            let length = lengths.get(index).copied().unwrap_or(0);
            let ids = split(&mut id_rest, 4 * length);
            let text = split(&mut text_rest, text_lengths.get(index).copied().unwrap_or(0));
            records.push(PromptRecord {
                rows: rows.get(index).copied().unwrap_or(0),
                length,
                ids,
                text,
            });
        }
        take(Step::Prompts { records: &records, boundary })?;
        (next, start) = (upto, chunk_start);
        ids_at += ids;
        text_at += text;
    }
    Ok(())
}

fn split<'a>(rest: &mut &'a [u8], bytes: u64) -> &'a [u8] {
    let at = crate::shard::length(bytes).min(rest.len());
    let (head, tail) = rest.split_at(at);
    *rest = tail;
    head
}

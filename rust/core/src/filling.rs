//! The shard being filled: its file, its prompts, and what of it is committed as pieces.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::build::{Build, FILLING, Mark, PromptTable};
use crate::disk::Disk;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::layout::Plan;
use crate::manifest::Entry;
use crate::publish;
use crate::rebuild::{self, Step};
use crate::shard::{Start, length};
use crate::source::Source;

/// The shard being filled.
#[derive(Debug)]
pub(crate) struct Filling {
    pub(crate) build: Build,
    pub(crate) prompts: PromptTable,
    /// Prompts without rows that begin where this shard ends: they open the next one, or belong
    /// to this one if it is the last.
    pub(crate) boundary: Option<PromptTable>,
    pub(crate) head: u64,
    /// Per site: NaN, infinite, overflowed.
    pub(crate) counts: BTreeMap<u64, [u64; 3]>,
    pub(crate) pieces: Vec<Entry>,
    pub(crate) committed_rows: u64,
    committed: Mark,
    committed_boundary: Mark,
}

impl Filling {
    /// Begins the shard whose first row and prompt are `start`, of which `head` rows belong to the prompt
    /// before. Where the total is known, the file is laid out for what is to come, and its room
    /// is reserved.
    pub(crate) fn open(
        disk: &dyn Disk,
        plan: &Arc<Plan>,
        rows_total: Option<u64>,
        (start, head): (Start, u64),
    ) -> Result<Self> {
        let rows = plan.rows_per_shard();
        let capacity = rows_total.map_or(rows, |total| rows.min(total.saturating_sub(start.row)));
        let prompts = PromptTable::create(disk, "filling", plan, start)?;
        Ok(Self {
            build: Build::create(disk, plan, FILLING, (capacity, start), rows_total.is_some())?,
            prompts,
            boundary: None,
            head: head.min(rows),
            counts: BTreeMap::new(),
            pieces: Vec::new(),
            committed_rows: 0,
            committed: Mark::default(),
            committed_boundary: Mark::default(),
        })
    }

    /// Rebuilds the shard whose first row and prompt are `start` from its pieces, checked.
    pub(crate) fn rebuild(
        disk: &dyn Disk,
        plan: &Arc<Plan>,
        rows_total: Option<u64>,
        pieces: &[Entry],
        start: Start,
    ) -> Result<Self> {
        let head = pieces.first().map_or(0, |piece| piece.head);
        let mut filling = Self::open(disk, plan, rows_total, (start, head))?;
        rebuild::from_pieces(disk, plan, pieces, start, &mut |step| match step {
            Step::Rows { stream, bytes } => {
                filling.build.grow(0).get_mut(stream).map_or(Ok(()), |to| to.append(bytes))
            }
            Step::Grow(rows) => {
                filling.build.grow(rows);
                Ok(())
            }
            Step::Prompts { records, boundary } => {
                filling.table(disk, plan, boundary)?.append(records)
            }
        })?;
        for &[site, nan, infinite, overflow] in pieces.iter().flat_map(|piece| &piece.counts) {
            filling.count(site, [nan, infinite, overflow]);
        }
        filling.pieces = pieces.to_vec();
        filling.mark_committed();
        Ok(filling)
    }

    pub(crate) fn table(
        &mut self,
        disk: &dyn Disk,
        plan: &Plan,
        boundary: bool,
    ) -> Result<&mut PromptTable> {
        if !boundary {
            return Ok(&mut self.prompts);
        }
        match &mut self.boundary {
            Some(table) => Ok(table),
            empty @ None => {
                Ok(empty.insert(PromptTable::create(disk, "boundary", plan, self.build.start())?))
            }
        }
    }

    /// Appends `rows` more rows of each source (sites, then row tables) from row `from` on.
    pub(crate) fn add_rows(
        &mut self,
        plan: &Plan,
        sources: &[&dyn Source],
        (from, rows): (u64, u64),
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        let before = self.build.rows();
        let row_bytes: Vec<u64> =
            (0..sources.len()).map(|stream| self.build.stream_row_bytes(stream)).collect();
        // Values of the row tables are not looked at.
        let dtypes = plan.sites().iter().map(|site| site.dtype).chain([Dtype::U8; 3]);
        let mut found = Vec::new();
        let streams = self.build.grow(rows).iter_mut().zip(sources).zip(row_bytes).zip(dtypes);
        for (index, (((stream, &source), bytes), dtype)) in streams.enumerate() {
            let range = (length(from * bytes), length(rows * bytes));
            let (nan, infinite) = stream.append_from(source, range, dtype, scratch)?;
            if nan + infinite > 0 {
                found.push((index as u64, [nan, infinite, 0]));
            }
        }
        self.build.start_writeback(before);
        for (site, counts) in found {
            self.count(site, counts);
        }
        Ok(())
    }

    pub(crate) fn count(&mut self, site: u64, more: [u64; 3]) {
        let counts = self.counts.entry(site).or_default();
        for (count, more) in counts.iter_mut().zip(more) {
            *count += more;
        }
    }

    pub(crate) fn boundary_mark(&self) -> Mark {
        self.boundary.as_ref().map_or(Mark::default(), PromptTable::mark)
    }

    pub(crate) fn has_uncommitted(&self) -> bool {
        self.build.rows() > self.committed_rows
            || self.prompts.mark() != self.committed
            || self.boundary_mark() != self.committed_boundary
    }

    /// Returns whether one piece already is the shard that finishing would write.
    pub(crate) fn is_one_piece(&self) -> bool {
        self.pieces.len() == 1 && !self.has_uncommitted()
    }

    pub(crate) fn tables(&self) -> Vec<(&PromptTable, Mark)> {
        std::iter::once((&self.prompts, self.committed))
            .chain(self.boundary.iter().map(|table| (table, self.committed_boundary)))
            .collect()
    }

    pub(crate) fn all_tables(&self) -> Vec<(&PromptTable, Mark)> {
        self.tables().into_iter().map(|(table, _)| (table, Mark::default())).collect()
    }

    pub(crate) fn mark_committed(&mut self) {
        self.committed_rows = self.build.rows();
        self.committed = self.prompts.mark();
        self.committed_boundary = self.boundary_mark();
    }

    pub(crate) fn uncommitted_counts(&self) -> Vec<[u64; 4]> {
        let mut counts = self.counts.clone();
        for &[site, nan, infinite, overflow] in self.pieces.iter().flat_map(|piece| &piece.counts) {
            let left = counts.entry(site).or_default();
            for (count, committed) in left.iter_mut().zip([nan, infinite, overflow]) {
                *count -= committed;
            }
        }
        counts_list(&counts)
    }
}

pub(crate) fn counts_list(counts: &BTreeMap<u64, [u64; 3]>) -> Vec<[u64; 4]> {
    counts
        .iter()
        .filter(|(_, counts)| counts.iter().any(|&count| count > 0))
        .map(|(&site, &[nan, infinite, overflow])| [site, nan, infinite, overflow])
        .collect()
}

/// Returns where the shard after these begins.
pub(crate) fn start_after(shards: &[Entry]) -> Start {
    shards.iter().fold(Start::default(), |start, shard| Start {
        row: start.row + shard.rows,
        prompt: start.prompt + shard.prompts,
    })
}

/// Completes the place of damage in the shard being filled, which follows the shards `full`:
/// it ends with the rows and prompts appended so far.
pub(crate) fn located(error: Error, full: &[Entry], (rows, prompts): (u64, u64)) -> Error {
    let mut error = error;
    if let Error::Damaged { place, .. } = &mut error
        && publish::is_part(&place.shard)
    {
        place.rows.1 = place.rows.1.min(rows).max(place.rows.0);
        place.prompts = (start_after(full).prompt.saturating_sub(1), prompts);
    }
    error
}

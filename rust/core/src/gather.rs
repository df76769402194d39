//! Rows of one or many columns, copied into one buffer.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::shard::length;
use crate::source::Sink;
use crate::store::{Opened, Store, View};

/// Where one wanted row lies.
#[derive(Clone, Copy)]
struct Located {
    /// Index into the list of shards that this gather uses.
    shard: usize,
    /// The row in that shard.
    row: u64,
}

impl Store {
    /// Copies `rows` of a site into `out`, row `i` to `i × stride + offset`.
    ///
    /// With `verify`, every checksum block that is touched is checked, and rows are taken from
    /// the bytes that were checked.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] for a row out of range, [`Error::Mismatch`] if `out` is too short, and
    /// [`Error::Missing`], [`Error::Damaged`].
    pub fn gather(
        &self,
        site: usize,
        rows: &[i64],
        out: &mut dyn Sink,
        (offset, stride): (usize, usize),
        verify: bool,
    ) -> Result<()> {
        let row_bytes = length(self.plan().row_bytes(site));
        for &row in rows {
            if u64::try_from(row).map_or(true, |row| row >= self.rows()) {
                return Err(Error::Row { row, rows: self.rows() });
            }
        }
        let needed = rows.len().checked_sub(1).map_or(0, |last| last * stride + offset + row_bytes);
        if out.len() < needed {
            return Err(Error::Mismatch {
                what: String::from("bytes of the buffer to gather into"),
                expected: format!("at least {needed}"),
                found: out.len().to_string(),
            });
        }
        let out = std::cell::RefCell::new(out);
        self.with_view(|view| {
            let mut out = out.borrow_mut();
            let (shards, located) = self.locate_rows(view, rows)?;
            let target = Target { out: &mut **out, offset, stride, row_bytes };
            if verify {
                copy_checked(&shards, &located, site, target)
            } else {
                copy(&shards, &located, site, target)
            }
        })
    }

    fn locate_rows(&self, view: &View, rows: &[i64]) -> Result<(Vec<Arc<Opened>>, Vec<Located>)> {
        let mut shards: Vec<Arc<Opened>> = Vec::new();
        let mut slots: Vec<Option<usize>> = vec![None; view.starts.len()];
        let mut located = Vec::with_capacity(rows.len());
        for &row in rows {
            let row = row.unsigned_abs();
            let index = view.shard_of_row(row);
            let slot = slots.get(index).copied().flatten();
            let shard = if let Some(shard) = slot {
                shard
            } else {
                shards.push(view.open(self.disk(), index)?);
                let shard = shards.len() - 1;
                if let Some(slot) = slots.get_mut(index) {
                    *slot = Some(shard);
                }
                shard
            };
            let start = view.starts.get(index).map_or(0, |start| start.row);
            located.push(Located { shard, row: row - start });
        }
        Ok((shards, located))
    }
}

struct Target<'a> {
    out: &'a mut dyn Sink,
    offset: usize,
    stride: usize,
    row_bytes: usize,
}

impl Target<'_> {
    fn put(&mut self, index: usize, row: Option<&[u8]>) -> Result<()> {
        let row = row.ok_or_else(unreadable)?;
        self.out.copy_from(index * self.stride + self.offset, row);
        Ok(())
    }
}

/// The error for what a checked shard always has.
fn unreadable() -> Error {
    Error::Mismatch {
        what: String::from("a row of a checked shard"),
        expected: String::from("its bytes in a mapped file"),
        found: String::from("nothing: this disk cannot be mapped"),
    }
}

fn copy(
    shards: &[Arc<Opened>],
    located: &[Located],
    site: usize,
    mut target: Target<'_>,
) -> Result<()> {
    let regions: Vec<&[u8]> = shards
        .iter()
        .map(|opened| {
            let region = opened.shard.layout().site(site);
            region.and_then(|region| opened.shard.region_bytes(region)).unwrap_or_default()
        })
        .collect();
    let row_bytes = target.row_bytes;
    for (index, place) in located.iter().enumerate() {
        let from = length(place.row) * row_bytes;
        let bytes = regions.get(place.shard).and_then(|region| region.get(from..from + row_bytes));
        target.put(index, bytes)?;
    }
    Ok(())
}

fn copy_checked(
    shards: &[Arc<Opened>],
    located: &[Located],
    site: usize,
    mut target: Target<'_>,
) -> Result<()> {
    let mut order: Vec<usize> = (0..located.len()).collect();
    let place = |index: usize| located.get(index).copied().unwrap_or(Located { shard: 0, row: 0 });
    order.sort_unstable_by_key(|&index| (place(index).shard, place(index).row));
    let row_bytes = target.row_bytes as u64;
    let mut held: Option<(usize, u64)> = None;
    let mut scratch = Vec::new();
    for index in order {
        let wanted = place(index);
        let Some(opened) = shards.get(wanted.shard) else {
            continue;
        };
        let Some(region) = opened.shard.layout().site(site) else {
            continue;
        };
        let block = wanted.row * row_bytes / region.block_bytes;
        let begin = block * region.block_bytes;
        if held != Some((wanted.shard, block)) {
            let end = region.bytes.min(begin + region.block_bytes);
            scratch.resize(length(end - begin), 0);
            opened.shard.read_block(region, block, &mut scratch)?;
            held = Some((wanted.shard, block));
        }
        let from = length(wanted.row * row_bytes - begin);
        target.put(index, scratch.get(from..from + target.row_bytes))?;
    }
    Ok(())
}

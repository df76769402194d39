//! Reading one shard: checked at first use, then by blocks.
//!
//! Size, header and checksum tables are checked against the name before anything else is read;
//! after that every block read here is checked against its CRC32C.

use std::sync::{Arc, OnceLock};

use crate::checksum;
use crate::disk::{Disk, DiskFile, FileId, Folder};
use crate::error::{Error, Place, Result};
use crate::header;
use crate::layout::{Layout, Plan, Region, Tensor};
use crate::manifest::Entry;
use crate::map::ReadMap;
use crate::side::Side;

/// Where a shard's rows and prompts begin in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Start {
    /// The first row.
    pub row: u64,
    /// The first prompt whose table entry lies here.
    pub prompt: u64,
}

/// Where a shard's bytes are read from.
#[derive(Debug)]
enum Bytes {
    /// The open file.
    File(Box<dyn DiskFile>),
    /// A read-only mapping of all of it, the file closed again.
    Map(ReadMap),
}

impl Bytes {
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::File(file) => file.read_at(offset, out),
            Self::Map(map) => {
                let from = length(offset);
                let bytes = map.bytes().get(from..from.saturating_add(out.len()));
                let bytes = bytes.ok_or_else(|| {
                    let ended = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    Error::io("read", "a mapped shard", ended)
                })?;
                out.copy_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// An open shard whose size, header and tables are those that its name stands for.
#[derive(Debug)]
pub struct Shard {
    bytes: Bytes,
    id: FileId,
    plan: Arc<Plan>,
    entry: Entry,
    start: Start,
    layout: Layout,
    crcs: Vec<u8>,
    xxh3s: Vec<u8>,
    /// For naming damage only.
    prompt_starts: OnceLock<Option<Vec<u64>>>,
}

impl Shard {
    /// Opens a shard and checks its size, header and tables.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], [`Error::Damaged`], [`Error::Io`].
    pub fn open(disk: &dyn Disk, plan: &Arc<Plan>, entry: &Entry, start: Start) -> Result<Self> {
        let place = |site: &str| Box::new(place(entry, start, site, (0, entry.rows)));
        let layout = plan.layout(&entry.size()).map_err(|error| Error::Damaged {
            place: place("whole file"),
            found: format!("no file can be as the manifest says: {error}"),
        })?;
        let file = match disk.open(Folder::Shards, &entry.file_name()) {
            Err(error) if error.is_not_found() => {
                return Err(Error::Missing { place: place("whole file"), version: 0 });
            }
            other => other?,
        };
        let id = file.id()?;
        if id.bytes != layout.file_bytes {
            let found = format!("it has {} bytes, not {}", id.bytes, layout.file_bytes);
            return Err(Error::Damaged { place: place("whole file"), found });
        }
        let header = read(&*file, 0, layout.header_bytes)?;
        let tables_at = layout.side(Side::Crc32c).map_or(0, |region| region.offset);
        let tables = read(&*file, tables_at, layout.file_bytes - tables_at)?;
        let name = checksum::name([header.as_slice(), tables.as_slice()]);
        if name != entry.name {
            let found = format!("header and checksum tables have the name {name}");
            return Err(Error::Damaged { place: place("header"), found });
        }
        let table = |side: Side| -> Vec<u8> {
            let span = layout.side(side).and_then(|region| {
                let from = usize::try_from(region.offset - tables_at).ok()?;
                tables.get(from..from + usize::try_from(region.bytes).ok()?)
            });
            span.unwrap_or_default().to_vec()
        };
        let (crcs, xxh3s) = (table(Side::Crc32c), table(Side::Xxh3));
        Ok(Self {
            bytes: Bytes::File(file),
            id,
            plan: Arc::clone(plan),
            entry: entry.clone(),
            start,
            layout,
            crcs,
            xxh3s,
            prompt_starts: OnceLock::new(),
        })
    }

    /// Returns the shard's layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the manifest's entry.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Returns where rows and prompts begin.
    pub fn start(&self) -> Start {
        self.start
    }

    /// Maps the file read-only for this library's own reading, and closes it: a store may have
    /// more shards than a process may have open files.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn mapped(self) -> Result<Self> {
        let bytes = match self.bytes {
            Bytes::File(file) => match file.descriptor() {
                Some(descriptor) => Bytes::Map(ReadMap::new(descriptor, self.id.bytes)?),
                None => Bytes::File(file),
            },
            mapped @ Bytes::Map(_) => mapped,
        };
        Ok(Self { bytes, ..self })
    }

    /// Returns the bytes of a region, unchecked, where the file is mapped.
    pub fn region_bytes(&self, region: &Region) -> Option<&[u8]> {
        match &self.bytes {
            Bytes::File(_) => None,
            Bytes::Map(map) => {
                let from = length(region.offset);
                map.bytes().get(from..from.checked_add(length(region.bytes))?)
            }
        }
    }

    /// Returns which file was checked.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Returns the recorded CRC of block `index` of a region.
    pub fn crc(&self, region: &Region, index: u64) -> Option<u32> {
        let at = usize::try_from(region.first_crc + index).ok()? * 4;
        let bytes = self.crcs.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Returns the recorded XXH3-128 of the `index`-th checked region.
    pub fn xxh3(&self, index: usize) -> Option<[u64; 2]> {
        let bytes = self.xxh3s.get(index * 16..index * 16 + 16)?;
        let (low, high) = bytes.split_at(8);
        Some([u64::from_le_bytes(low.try_into().ok()?), u64::from_le_bytes(high.try_into().ok()?)])
    }

    /// Returns whether the header is the one that the manifest's arithmetic gives.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn header_is_canonical(&self) -> Result<bool> {
        let mut found = vec![0; length(self.layout.header_bytes)];
        self.bytes.read_at(0, &mut found)?;
        Ok(found == header::header(&self.plan, &self.layout, self.entry.head))
    }

    /// Hands the checked bytes `from..to` of a region to `take`, block by block in order.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] with the rows of the block, [`Error::Io`], and what `take` returns.
    pub fn read_checked(
        &self,
        region: &Region,
        (from, to): (u64, u64),
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        debug_assert!(from <= to && to <= region.bytes);
        let mut scratch = Vec::new();
        let mut at = from;
        while at < to {
            let block = at / region.block_bytes;
            let begin = block * region.block_bytes;
            let end = region.bytes.min(begin + region.block_bytes);
            scratch.resize(length(end - begin), 0);
            self.read_block(region, block, &mut scratch)?;
            let upto = to.min(end);
            let bytes = scratch.get(length(at - begin)..length(upto - begin));
            take(bytes.unwrap_or_default())?;
            at = upto;
        }
        Ok(())
    }

    /// Fills `out` with a region's bytes from `from` on, unchecked.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn read_raw(&self, region: &Region, from: u64, out: &mut [u8]) -> Result<()> {
        self.bytes.read_at(region.offset + from, out)
    }

    /// Fills `out` with block `block` of a region, checked.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] with the rows of the block, [`Error::Io`].
    pub fn read_block(&self, region: &Region, block: u64, out: &mut [u8]) -> Result<()> {
        self.bytes.read_at(region.offset + block * region.block_bytes, out)?;
        let (found, recorded) = (checksum::crc32c(0, out), self.crc(region, block));
        if Some(found) == recorded {
            return Ok(());
        }
        let found = format!(
            "block {block} has the checksum {found:08x}, recorded is {:08x}",
            recorded.unwrap_or(0)
        );
        Err(Error::Damaged { place: Box::new(self.block_place(region, block)), found })
    }

    /// Returns the checked bytes `from..to` of a side tensor; none where the store lacks it.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], [`Error::Io`].
    pub fn side_span(&self, side: Side, (from, to): (u64, u64)) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(region) = self.layout.side(side) {
            let range = (from.min(region.bytes), to.min(region.bytes));
            self.read_checked(region, range, &mut |block| {
                bytes.extend_from_slice(block);
                Ok(())
            })?;
        }
        Ok(bytes)
    }

    /// Returns the checked u64 values of a side tensor.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`], [`Error::Io`].
    pub fn side_u64(&self, side: Side) -> Result<Vec<u64>> {
        let bytes = self.side_span(side, (0, u64::MAX))?;
        let (chunks, _) = bytes.as_chunks::<8>();
        Ok(chunks.iter().map(|&chunk| u64::from_le_bytes(chunk)).collect())
    }

    /// Returns the error for a prompt table whose numbers are not those of the manifest.
    pub(crate) fn does_not_add_up(&self, side: Side) -> Error {
        let place = place(&self.entry, self.start, side.name(), (0, self.entry.rows));
        let found = String::from("its numbers do not add up to those of the manifest");
        Error::Damaged { place: Box::new(place), found }
    }

    /// Returns the place of one block.
    pub fn block_place(&self, region: &Region, block: u64) -> Place {
        let name = self.region_name(region);
        let row_bytes = match region.tensor {
            Tensor::Site(site) => self.plan.row_bytes(site),
            Tensor::Side(side @ (Side::RowToken | Side::RowPosition | Side::RowFlags)) => {
                side.dtype().size()
            }
            Tensor::Pad(_) | Tensor::Side(_) => {
                return place(&self.entry, self.start, &name, (0, self.entry.rows));
            }
        };
        let first = block * region.block_bytes / row_bytes;
        let last = ((block + 1) * region.block_bytes).div_ceil(row_bytes).min(self.entry.rows);
        let mut found = place(&self.entry, self.start, &name, (first, last));
        if (first, last) != (0, self.entry.rows)
            && let Some(starts) = self.prompt_starts()
        {
            let before = starts.partition_point(|&start| start <= first) as u64;
            let upto = starts.partition_point(|&start| start < last) as u64;
            found.prompts =
                ((self.start.prompt + before).saturating_sub(1), self.start.prompt + upto);
        }
        found
    }

    /// Returns the row of this shard at which each prompt starts, where the table can be read.
    fn prompt_starts(&self) -> Option<&[u64]> {
        let starts = self.prompt_starts.get_or_init(|| {
            let mut start = self.entry.head;
            let mut starts = self.side_u64(Side::PromptRows).ok()?;
            for rows in &mut starts {
                let next = start.checked_add(*rows)?;
                *rows = std::mem::replace(&mut start, next);
            }
            Some(starts)
        });
        starts.as_deref()
    }

    /// Returns a region's tensor name.
    pub fn region_name(&self, region: &Region) -> String {
        match region.tensor {
            Tensor::Pad(index) => format!("#pad.{index}"),
            Tensor::Side(side) => side.name().to_owned(),
            Tensor::Site(index) => {
                self.plan.sites().get(index).map_or_else(String::new, |site| site.path.clone())
            }
        }
    }
}

/// Returns rows `rows` (counted in the shard) of a shard as a place in the store.
pub fn place(entry: &Entry, start: Start, site: &str, rows: (u64, u64)) -> Place {
    let before = u64::from(entry.head > 0);
    Place {
        shard: entry.file_name(),
        site: site.to_owned(),
        rows: (start.row + rows.0, start.row + rows.1),
        prompts: (start.prompt.saturating_sub(before), start.prompt + entry.prompts),
    }
}

fn read(file: &dyn DiskFile, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut out = vec![0; length(bytes)];
    file.read_at(offset, &mut out)?;
    Ok(out)
}

/// Returns a length in memory; on the 64-bit systems that lamina supports every u64 that a file's
/// size bounds is one.
pub(crate) fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

//! Building one shard file: rows as they come, prompts in temporary files, header last.

use std::sync::Arc;

use crate::checksum::{self, BLOCK_BYTES, Running};
use crate::disk::{Disk, DiskFile, Folder};
use crate::error::{Error, Result};
use crate::header;
use crate::layout::{Layout, Plan, Size, Tensor};
use crate::manifest::Entry;
use crate::shard::Start;
use crate::side::Side;
use crate::stream::{Origin, Stream};

/// The shard being filled.
pub(crate) const FILLING: &str = "filling.part";
/// A short shard on its way.
pub(crate) const PIECE: &str = "piece.part";

/// The side tensors of prompts, in file order.
const PROMPT_SIDES: [Side; 5] = [
    Side::PromptRows,
    Side::PromptLength,
    Side::PromptIds,
    Side::PromptTextLength,
    Side::PromptText,
];

/// One prompt as its table has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PromptRecord<'a> {
    pub(crate) rows: u64,
    pub(crate) length: u64,
    /// Little-endian u32.
    pub(crate) ids: &'a [u8],
    /// Empty where the store keeps none.
    pub(crate) text: &'a [u8],
}

/// How far a prompt table has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) prompts: u64,
    pub(crate) ids: u64,
    pub(crate) text_bytes: u64,
}

/// The prompt tables of a shard while it is filled: in temporary files, not in RAM.
#[derive(Debug)]
pub(crate) struct PromptTable {
    streams: Vec<Stream>,
    texts: bool,
    mark: Mark,
}

impl PromptTable {
    /// Begins a table in temporary files whose names begin with `prefix`.
    /// They are those of the shard that begins at `start`.
    pub(crate) fn create(disk: &dyn Disk, prefix: &str, plan: &Plan, start: Start) -> Result<Self> {
        let texts = plan.texts();
        let rows = (start.row, start.row + plan.rows_per_shard());
        let mut streams = Vec::with_capacity(5);
        for side in PROMPT_SIDES.iter().take(if texts { 5 } else { 3 }) {
            let name = format!("{prefix}{}.part", side.name().replace(['#', '.'], "-"));
            let file: Arc<dyn DiskFile> = Arc::from(disk.create(Folder::Shards, &name)?);
            let origin = Origin { site: side.name().to_owned(), rows, row_bytes: None };
            streams.push(Stream::new(&file, 0, BLOCK_BYTES).of(origin));
        }
        Ok(Self { streams, texts, mark: Mark::default() })
    }

    /// Begins a table at its final place in `file`.
    fn in_place(file: &Arc<dyn DiskFile>, layout: &Layout, texts: bool) -> Self {
        let streams = PROMPT_SIDES
            .iter()
            .filter_map(|&side| layout.side(side))
            .map(|region| Stream::new(file, region.offset, BLOCK_BYTES))
            .collect();
        Self { streams, texts, mark: Mark::default() }
    }

    pub(crate) fn mark(&self) -> Mark {
        self.mark
    }

    /// Appends prompts, which come in chunks so that writes are not tiny.
    pub(crate) fn append(&mut self, prompts: &[PromptRecord<'_>]) -> Result<()> {
        let mut columns: [Vec<u8>; 5] = Default::default();
        let [rows, lengths, ids, text_lengths, texts] = &mut columns;
        for prompt in prompts {
            rows.extend_from_slice(&prompt.rows.to_le_bytes());
            lengths.extend_from_slice(&prompt.length.to_le_bytes());
            ids.extend_from_slice(prompt.ids);
            if self.texts {
                text_lengths.extend_from_slice(&(prompt.text.len() as u64).to_le_bytes());
                texts.extend_from_slice(prompt.text);
            }
        }
        self.mark.prompts += prompts.len() as u64;
        self.mark.ids += ids.len() as u64 / 4;
        self.mark.text_bytes += texts.len() as u64;
        for (stream, column) in self.streams.iter_mut().zip(&columns) {
            if !column.is_empty() {
                stream.append(column)?;
            }
        }
        Ok(())
    }

    /// Appends everything of `other` from `from` on, checked as it is read back.
    pub(crate) fn append_table(&mut self, other: &Self, from: Mark) -> Result<()> {
        let starts =
            [from.prompts * 8, from.prompts * 8, from.ids * 4, from.prompts * 8, from.text_bytes];
        for ((stream, source), start) in self.streams.iter_mut().zip(&other.streams).zip(starts) {
            source.read_checked((start, source.len()), &mut |bytes| stream.append(bytes))?;
        }
        self.mark.prompts += other.mark.prompts - from.prompts;
        self.mark.ids += other.mark.ids - from.ids;
        self.mark.text_bytes += other.mark.text_bytes - from.text_bytes;
        Ok(())
    }
}

/// A shard file being written: the streams of its sites and row tables.
#[derive(Debug)]
pub(crate) struct Build {
    plan: Arc<Plan>,
    file: Arc<dyn DiskFile>,
    part: &'static str,
    capacity: u64,
    start: Start,
    /// Sites, then `#row.token`, `#row.position`, `#row.flags`.
    streams: Vec<Stream>,
    rows: u64,
}

impl Build {
    /// Begins a shard file laid out for `capacity` rows. `reserve` asks the disk for the room of
    /// all of them.
    pub(crate) fn create(
        disk: &dyn Disk,
        plan: &Arc<Plan>,
        part: &'static str,
        (capacity, start): (u64, Start),
        reserve: bool,
    ) -> Result<Self> {
        let origin = |site: &str, row_bytes: u64| Origin {
            site: site.to_owned(),
            rows: (start.row, start.row + capacity),
            row_bytes: Some(row_bytes),
        };
        let layout = plan.layout(&Size { rows: capacity, ..Size::default() })?;
        let file: Arc<dyn DiskFile> = Arc::from(disk.create(Folder::Shards, part)?);
        if reserve {
            file.reserve(layout.file_bytes)?;
        }
        let mut streams = Vec::with_capacity(plan.sites().len() + 3);
        for (index, site) in plan.sites().iter().enumerate() {
            if let Some(region) = layout.site(index) {
                let stream = Stream::new(&file, region.offset, region.block_bytes);
                streams.push(stream.of(origin(&site.path, plan.row_bytes(index))));
            }
        }
        for side in [Side::RowToken, Side::RowPosition, Side::RowFlags] {
            if let Some(region) = layout.side(side) {
                let stream = Stream::new(&file, region.offset, region.block_bytes);
                streams.push(stream.of(origin(side.name(), side.dtype().size())));
            }
        }
        Ok(Self { plan: Arc::clone(plan), file, part, capacity, start, streams, rows: 0 })
    }

    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Returns where in the store this shard begins.
    pub(crate) fn start(&self) -> Start {
        self.start
    }

    /// Returns the streams, sites first, to append `rows` more rows to each.
    pub(crate) fn grow(&mut self, rows: u64) -> &mut [Stream] {
        self.rows += rows;
        &mut self.streams
    }

    /// Starts writing back rows from `from` on.
    pub(crate) fn start_writeback(&self, from: u64) {
        for (index, stream) in self.streams.iter().enumerate() {
            stream.start_writeback(from * self.stream_row_bytes(index));
        }
    }

    /// Returns the bytes that a row has in stream `index`.
    pub(crate) fn stream_row_bytes(&self, index: usize) -> u64 {
        match index.checked_sub(self.plan.sites().len()) {
            None => self.plan.row_bytes(index),
            Some(2) => 1,
            Some(_) => 4,
        }
    }

    /// Writes rows `from..` of this shard, and the prompts of `tables` (each from its mark on),
    /// as a short shard of their own.
    pub(crate) fn piece(
        &self,
        disk: &dyn Disk,
        from: u64,
        tables: &[(&PromptTable, Mark)],
        head: u64,
    ) -> Result<(Sealed, Size)> {
        let mut size = Size { rows: self.rows - from, ..Size::default() };
        for (table, mark) in tables {
            size.prompts += table.mark.prompts - mark.prompts;
            size.ids += table.mark.ids - mark.ids;
            size.text_bytes += table.mark.text_bytes - mark.text_bytes;
        }
        let mut piece = Self::create(disk, &self.plan, PIECE, (size.rows, self.start), false)?;
        let layout = self.plan.layout(&size)?;
        piece.file.reserve(layout.file_bytes)?;
        for index in 0..self.streams.len() {
            let row_bytes = self.stream_row_bytes(index);
            if let (Some(source), Some(target)) =
                (self.streams.get(index), piece.streams.get_mut(index))
            {
                let range = (from * row_bytes, self.rows * row_bytes);
                source.read_checked(range, &mut |bytes| target.append(bytes))?;
            }
        }
        piece.rows = size.rows;
        let mut prompts = PromptTable::in_place(&piece.file, &layout, self.plan.texts());
        for (table, mark) in tables {
            prompts.append_table(table, *mark)?;
        }
        Ok((piece.seal(&prompts, head)?, size))
    }

    /// Writes what is missing (prompt tables, checksums, header last) and makes the file durable.
    pub(crate) fn seal(self, prompts: &PromptTable, head: u64) -> Result<Sealed> {
        debug_assert_eq!(self.rows, self.capacity, "a shard is sealed in its own layout");
        let size = Size {
            rows: self.rows,
            prompts: prompts.mark.prompts,
            ids: prompts.mark.ids,
            text_bytes: prompts.mark.text_bytes,
        };
        let layout = self.plan.layout(&size)?;
        let mut crcs: Vec<u8> = Vec::new();
        let mut xxh3s: Vec<u8> = Vec::new();
        let mut record = |running: &Running| {
            crcs.extend(running.blocks().flat_map(u32::to_le_bytes));
            xxh3s.extend(running.xxh3().iter().flat_map(|half| half.to_le_bytes()));
        };
        let sites = self.plan.sites().len();
        for region in layout.checked() {
            let stream = match region.tensor {
                Tensor::Pad(_) => {
                    record(&zeros(region.bytes));
                    continue;
                }
                Tensor::Site(index) => self.streams.get(index),
                Tensor::Side(named) => {
                    let prompt = PROMPT_SIDES.iter().position(|&side| side == named);
                    let row = named.row_table().map(|table| sites + table);
                    let of_row = row.and_then(|index| self.streams.get(index));
                    of_row.or_else(|| prompts.streams.get(prompt?))
                }
            };
            let Some(stream) = stream else {
                let reason = String::from("a layout with a tensor that nobody wrote");
                return Err(Error::Closed { reason });
            };
            record(stream.running());
            place(stream, &self.file, region.offset)?;
        }
        let header = header::header(&self.plan, &layout, head);
        let mut tables = crcs;
        let gap = layout.side(Side::Crc32c).zip(layout.side(Side::Xxh3));
        let Some((crc_region, xxh3_region)) = gap else {
            return Err(Error::Closed { reason: String::from("a layout without checksum tables") });
        };
        tables.resize(crate::shard::length(xxh3_region.offset - crc_region.offset), 0);
        tables.extend_from_slice(&xxh3s);
        self.file.write_at(crc_region.offset, &tables)?;
        self.file.write_at(0, &header)?;
        self.file.sync()?;
        let name = checksum::name([header.as_slice(), tables.as_slice()]);
        Ok(Sealed { part: self.part, name, size, head })
    }
}

/// Copies a stream to where the layout wants it, checked as it is read back, unless it is there.
fn place(stream: &Stream, file: &Arc<dyn DiskFile>, offset: u64) -> Result<()> {
    if stream.lies_at(file, offset) {
        return Ok(());
    }
    let mut at = offset;
    stream.read_checked((0, stream.len()), &mut |bytes| {
        file.write_at(at, bytes)?;
        at += bytes.len() as u64;
        Ok(())
    })
}

fn zeros(bytes: u64) -> Running {
    let mut running = Running::new(BLOCK_BYTES);
    running.update(&vec![0; crate::shard::length(bytes)]);
    running
}

/// A shard file that is whole and durable under its temporary name.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) part: &'static str,
    pub(crate) name: String,
    pub(crate) size: Size,
    pub(crate) head: u64,
}

impl Sealed {
    /// Returns the manifest's entry for it.
    pub(crate) fn entry(&self, counts: Vec<[u64; 4]>) -> Entry {
        Entry {
            name: self.name.clone(),
            rows: self.size.rows,
            prompts: self.size.prompts,
            ids: self.size.ids,
            text_bytes: self.size.text_bytes,
            head: self.head,
            counts,
        }
    }
}

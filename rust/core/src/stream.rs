//! One tensor as it grows in a file, with its checksums; read back only checked.

use std::sync::Arc;

use crate::build::FILLING;
use crate::checksum::{Running, crc32c};
use crate::disk::DiskFile;
use crate::dtype::Dtype;
use crate::error::{Error, Place, Result};
use crate::shard::length;
use crate::source::Source;
use crate::stats;

/// Bytes moved at a time, up to a multiple of it in the file: the page cache then holds them as
/// one page of this size, and a mapping costs one fault for it.
const CHUNK_BYTES: usize = 2 << 20;

/// A tensor's bytes from `offset` of a file on.
#[derive(Debug)]
pub(crate) struct Stream {
    file: Arc<dyn DiskFile>,
    offset: u64,
    running: Running,
    origin: Origin,
}

/// Whose rows a stream holds: what an error about it names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// The site or side tensor.
    pub(crate) site: String,
    /// The rows of the store that may be here, half-open.
    pub(crate) rows: (u64, u64),
    /// Bytes of a row; none where rows cannot be told apart.
    pub(crate) row_bytes: Option<u64>,
}

impl Origin {
    /// Returns the rows that bytes `from..to` belong to.
    fn rows_of(&self, (from, to): (u64, u64)) -> (u64, u64) {
        self.row_bytes.map_or(self.rows, |bytes| {
            (self.rows.0 + from / bytes, self.rows.0 + to.div_ceil(bytes))
        })
    }
}

impl Stream {
    pub(crate) fn new(file: &Arc<dyn DiskFile>, offset: u64, block_bytes: u64) -> Self {
        let (file, running) = (Arc::clone(file), Running::new(block_bytes));
        Self { file, offset, running, origin: Origin::default() }
    }

    /// Says whose rows these are.
    pub(crate) fn of(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    pub(crate) fn running(&self) -> &Running {
        &self.running
    }

    pub(crate) fn len(&self) -> u64 {
        self.running.len()
    }

    /// Returns whether its bytes already lie at `offset` of `file`.
    pub(crate) fn lies_at(&self, file: &Arc<dyn DiskFile>, offset: u64) -> bool {
        Arc::ptr_eq(&self.file, file) && self.offset == offset
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_at(self.offset + self.running.len(), bytes)?;
        self.running.update(bytes);
        Ok(())
    }

    /// Appends `bytes` of a source from `from` on, and returns how many values are NaN and
    /// infinite. What is checksummed and written is a copy, so the source may change meanwhile.
    pub(crate) fn append_from(
        &mut self,
        source: &dyn Source,
        (from, bytes): (usize, usize),
        dtype: Dtype,
        scratch: &mut Vec<u8>,
    ) -> Result<(u64, u64)> {
        let (mut nan, mut infinite) = (0, 0);
        let mut done = 0;
        while done < bytes {
            let at = usize::try_from(self.offset + self.len()).unwrap_or_default();
            scratch.resize((CHUNK_BYTES - at % CHUNK_BYTES).min(bytes - done), 0);
            source.copy_to(from + done, scratch);
            let (more_nan, more_infinite) = stats::not_finite(dtype, scratch);
            nan += more_nan;
            infinite += more_infinite;
            self.append(scratch)?;
            done += scratch.len();
        }
        Ok((nan, infinite))
    }

    /// Starts writing back everything appended since `from`.
    pub(crate) fn start_writeback(&self, from: u64) {
        self.file.start_writeback(self.offset + from, self.running.len() - from);
    }

    /// Hands the bytes `from..to` to `take` in order, checked against the checksums that were
    /// made when they were appended.
    pub(crate) fn read_checked(
        &self,
        (from, to): (u64, u64),
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let block_bytes = self.running.block_bytes();
        let mut scratch = Vec::new();
        let mut at = from;
        while at < to {
            let block = at / block_bytes;
            let begin = block * block_bytes;
            let end = self.running.len().min(begin + block_bytes);
            scratch.resize(length(end - begin), 0);
            self.file.read_at(self.offset + begin, &mut scratch)?;
            if Some(crc32c(0, &scratch)) != self.running.block(block) {
                let place = Place {
                    shard: String::from(FILLING),
                    site: self.origin.site.clone(),
                    rows: self.origin.rows_of((begin, end)),
                    prompts: (0, 0),
                };
                return Err(Error::Damaged {
                    place: Box::new(place),
                    found: format!(
                        "bytes {begin}..{end} are not those that were written; \
                         the disk or the memory is faulty"
                    ),
                });
            }
            let upto = to.min(end);
            take(scratch.get(length(at - begin)..length(upto - begin)).unwrap_or_default())?;
            at = upto;
        }
        Ok(())
    }
}

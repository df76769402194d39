//! What one `append` hands over: a run of whole prompts with all their rows.

use crate::build::PromptRecord;
use crate::error::{Error, Result};
use crate::layout::Plan;
use crate::source::Source;

/// Prompts are handed on in chunks of at most this many, and of about this many bytes of ids.
const CHUNK_PROMPTS: usize = 4096;
const CHUNK_BYTES: usize = 1 << 20;

/// One window. Rows are in prompt order, then token order.
#[derive(Clone, Copy)]
pub struct Window<'a> {
    /// Per site: `rows × row_bytes` bytes.
    pub columns: &'a [&'a dyn Source],
    /// Token id of each row, little-endian u32.
    pub tokens: &'a dyn Source,
    /// Position of each row in its prompt, little-endian u32, ascending within a prompt.
    pub positions: &'a [u32],
    /// Flags of each row; bit 0: generated.
    pub flags: &'a dyn Source,
    /// Rows of each prompt.
    pub prompt_rows: &'a [u64],
    /// Tokens of each prompt.
    pub prompt_lengths: &'a [u64],
    /// The prompts' token ids one after another, little-endian u32.
    pub prompt_ids: &'a [u8],
    /// The prompts' texts, where the store keeps them.
    pub texts: Option<&'a [String]>,
    /// `(site, row in this window, count)` of values that overflowed in a cast.
    pub overflow: &'a [(u64, u64, u64)],
}

impl std::fmt::Debug for Window<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Window")
            .field("rows", &self.rows())
            .field("prompts", &self.prompt_rows.len())
            .finish_non_exhaustive()
    }
}

fn expect(what: impl Into<String>, expected: u64, found: u64) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(Error::Mismatch { what: what.into(), expected, found })
}

impl<'a> Window<'a> {
    /// Returns the number of rows.
    pub fn rows(&self) -> u64 {
        self.positions.len() as u64
    }

    /// Checks every size, and that positions ascend within each prompt.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] that says what was expected and found.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        let (rows, prompts) = (self.rows(), self.prompt_rows.len() as u64);
        expect("the number of columns", plan.sites().len() as u64, self.columns.len() as u64)?;
        for (index, (site, column)) in plan.sites().iter().zip(self.columns).enumerate() {
            let bytes = rows.saturating_mul(plan.row_bytes(index));
            expect(format!("bytes of column `{}`", site.path), bytes, column.len() as u64)?;
        }
        expect("bytes of the tokens", rows * 4, self.tokens.len() as u64)?;
        expect("bytes of the flags", rows, self.flags.len() as u64)?;
        expect("prompt lengths", prompts, self.prompt_lengths.len() as u64)?;
        let total = |values: &[u64]| {
            values.iter().try_fold(0u64, |sum, &value| sum.checked_add(value)).unwrap_or(u64::MAX)
        };
        expect("rows of all prompts", rows, total(self.prompt_rows))?;
        let ids = total(self.prompt_lengths).saturating_mul(4);
        expect("bytes of the prompts' ids", ids, self.prompt_ids.len() as u64)?;
        if plan.texts() {
            expect("texts", prompts, self.texts.map_or(0, |texts| texts.len() as u64))?;
        }
        for &(site, row, _) in self.overflow {
            if site >= plan.sites().len() as u64 || row >= rows {
                expect("overflow entries within the window", 1, 0)?;
            }
        }
        let mut rest = self.positions;
        for (prompt, &count) in self.prompt_rows.iter().enumerate() {
            let (here, after) = rest.split_at(crate::shard::length(count).min(rest.len()));
            if !here.is_sorted_by(|first, second| first < second) {
                return Err(Error::Mismatch {
                    what: format!("positions of prompt {prompt} of the window"),
                    expected: String::from("ascending ones"),
                    found: format!("{:?}", here.iter().take(8).collect::<Vec<_>>()),
                });
            }
            rest = after;
        }
        Ok(())
    }

    /// Returns the prompts, to be taken in order.
    pub(crate) fn prompts(&self) -> Prompts<'a> {
        Prompts { window: *self, next: 0, start: 0, ids_at: 0 }
    }
}

/// A cursor over a window's prompts.
pub(crate) struct Prompts<'a> {
    window: Window<'a>,
    next: usize,
    start: u64,
    ids_at: usize,
}

impl<'a> Prompts<'a> {
    /// Returns the row of the window at which the next prompt starts; its rows, at the end.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next == self.window.prompt_rows.len()
    }

    /// Returns the next prompts that start before row `end`, a bounded number at a time; `None`
    /// when there are no more.
    pub(crate) fn before(&mut self, end: u64) -> Option<Vec<PromptRecord<'a>>> {
        let mut records = Vec::new();
        let mut bytes = 0;
        while records.len() < CHUNK_PROMPTS && bytes < CHUNK_BYTES && self.start < end {
            let (Some(&rows), Some(&length)) =
                (self.window.prompt_rows.get(self.next), self.window.prompt_lengths.get(self.next))
            else {
                break;
            };
            let ids_end = self.ids_at + crate::shard::length(length) * 4;
            let ids = self.window.prompt_ids.get(self.ids_at..ids_end).unwrap_or_default();
            let text = self
                .window
                .texts
                .and_then(|texts| texts.get(self.next))
                .map_or(&[][..], String::as_bytes);
            records.push(PromptRecord { rows, length, ids, text });
            bytes += ids.len() + text.len();
            self.ids_at = ids_end;
            self.start += rows;
            self.next += 1;
        }
        (!records.is_empty()).then_some(records)
    }
}

//! Rows and prompts: which rows a prompt has, which row a token is, which prompt a row is of.

use crate::error::{Error, Result};
use crate::shard::length;
use crate::side::Side;
use crate::store::{Store, View};

/// A prompt's rows and tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptRows {
    /// The first row.
    pub start: u64,
    /// Rows, perhaps none.
    pub rows: u64,
    /// Tokens, generated ones not counted.
    pub length: u64,
}

impl Store {
    fn check_prompt(&self, prompt: i64) -> Result<u64> {
        u64::try_from(prompt)
            .ok()
            .filter(|&prompt| prompt < self.prompts())
            .ok_or(Error::Prompt { prompt, prompts: self.prompts() })
    }

    /// Returns rows and tokens of the prompts `from..to`.
    ///
    /// # Errors
    ///
    /// [`Error::Prompt`] out of range; [`Error::Missing`], [`Error::Damaged`].
    pub fn prompt_rows(&self, from: u64, to: u64) -> Result<Vec<PromptRows>> {
        if to > self.prompts() || from > to {
            let prompt = i64::try_from(to).unwrap_or(i64::MAX);
            return Err(Error::Prompt { prompt, prompts: self.prompts() });
        }
        self.with_view(|view| {
            // Not reserved: how many there are is only what the manifest says, until shards agree.
            let mut found = Vec::new();
            let mut at = from;
            while at < to {
                let index = view.shard_of_prompt(at);
                let opened = view.open(self.disk(), index)?;
                let start = opened.shard.start();
                let table = opened.prompts()?;
                let first = length(at - start.prompt);
                let here = table.starts.iter().zip(&table.rows).zip(&table.lengths).skip(first);
                let before = found.len();
                for ((&row, &rows), &length) in here.take(length(to - at)) {
                    found.push(PromptRows { start: start.row + row, rows, length });
                }
                if found.len() == before {
                    break;
                }
                at += (found.len() - before) as u64;
            }
            Ok(found)
        })
    }

    /// Returns the token ids of a prompt, little-endian u32.
    ///
    /// # Errors
    ///
    /// As [`Store::prompt_rows`].
    pub fn prompt_ids(&self, prompt: i64) -> Result<Vec<u8>> {
        let prompt = self.check_prompt(prompt)?;
        self.with_view(|view| {
            let opened = view.open(self.disk(), view.shard_of_prompt(prompt))?;
            let table = opened.prompts()?;
            let index = length(prompt - opened.shard.start().prompt);
            let start = table.ids.get(index).copied().unwrap_or(0);
            let tokens = table.lengths.get(index).copied().unwrap_or(0);
            opened.shard.side_span(Side::PromptIds, (start * 4, (start + tokens) * 4))
        })
    }

    /// Returns the text of a prompt, where the store keeps them.
    ///
    /// # Errors
    ///
    /// As [`Store::prompt_rows`].
    pub fn prompt_text(&self, prompt: i64) -> Result<Option<String>> {
        let prompt = self.check_prompt(prompt)?;
        if !self.plan().texts() {
            return Ok(None);
        }
        self.with_view(|view| {
            let opened = view.open(self.disk(), view.shard_of_prompt(prompt))?;
            let starts = opened.text_starts()?;
            let index = length(prompt - opened.shard.start().prompt);
            let range = starts.get(index).copied().zip(starts.get(index + 1).copied());
            let range = range.unwrap_or_default();
            let text = opened.shard.side_span(Side::PromptText, range)?;
            Ok(Some(String::from_utf8_lossy(&text).into_owned()))
        })
    }

    /// Returns, for each prompt and position, the row of that token, or -1 if it is not stored.
    ///
    /// # Errors
    ///
    /// As [`Store::prompt_rows`].
    pub fn locate(&self, prompts: &[i64], positions: &[i64]) -> Result<Vec<i64>> {
        for &prompt in prompts {
            self.check_prompt(prompt)?;
        }
        self.with_view(|view| {
            let mut found = Vec::with_capacity(prompts.len());
            for (&prompt, &position) in prompts.iter().zip(positions) {
                found.push(self.locate_one(view, prompt.unsigned_abs(), position)?);
            }
            Ok(found)
        })
    }

    fn locate_one(&self, view: &View, prompt: u64, position: i64) -> Result<i64> {
        let opened = view.open(self.disk(), view.shard_of_prompt(prompt))?;
        let table = opened.prompts()?;
        let index = length(prompt - opened.shard.start().prompt);
        let rows = table.rows.get(index).copied().unwrap_or(0);
        let first = opened.shard.start().row + table.starts.get(index).copied().unwrap_or(0);
        let Ok(wanted) = u32::try_from(position) else {
            return Ok(-1);
        };
        // Positions ascend, one a row: token `wanted` is at most `wanted` rows in.
        let (mut low, mut high) = (0, rows.min(u64::from(wanted) + 1));
        while low < high {
            // Where every token is stored, the last candidate is the one.
            let middle =
                if high == u64::from(wanted) + 1 { high - 1 } else { low + (high - low) / 2 };
            let here = self.position(view, first + middle)?;
            if here == wanted {
                return Ok(i64::try_from(first + middle).unwrap_or(-1));
            }
            if here < wanted {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(-1)
    }

    fn position(&self, view: &View, row: u64) -> Result<u32> {
        let opened = view.open(self.disk(), view.shard_of_row(row))?;
        let bytes = opened.row_table(Side::RowPosition)?;
        let at = length(row - opened.shard.start().row) * 4;
        let value = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        Ok(value.map_or(0, u32::from_le_bytes))
    }

    /// Returns the prompt of each row.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] out of range; [`Error::Missing`], [`Error::Damaged`].
    pub fn prompts_of(&self, rows: &[i64]) -> Result<Vec<i64>> {
        self.with_view(|view| {
            rows.iter()
                .map(|&row| {
                    let wanted = u64::try_from(row).ok().filter(|&wanted| wanted < self.rows());
                    let Some(wanted) = wanted else {
                        return Err(Error::Row { row, rows: self.rows() });
                    };
                    let opened = view.open(self.disk(), view.shard_of_row(wanted))?;
                    let start = opened.shard.start();
                    let local = wanted - start.row;
                    let table = opened.prompts()?;
                    // The last prompt that starts at or before the row; none: the prompt before.
                    let after = table.starts.partition_point(|&begin| begin <= local) as u64;
                    Ok(i64::try_from(start.prompt + after).unwrap_or(i64::MAX) - 1)
                })
                .collect()
        })
    }

    /// Returns tokens, positions (little-endian u32) and flags of the rows `from..to`.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] out of range; [`Error::Missing`], [`Error::Damaged`].
    pub fn row_tables(&self, from: u64, to: u64) -> Result<[Vec<u8>; 3]> {
        if to > self.rows() || from > to {
            let row = i64::try_from(to).unwrap_or(i64::MAX);
            return Err(Error::Row { row, rows: self.rows() });
        }
        self.with_view(|view| {
            let mut tables: [Vec<u8>; 3] = Default::default();
            let mut at = from;
            while at < to {
                let index = view.shard_of_row(at);
                let opened = view.open(self.disk(), index)?;
                let start = opened.shard.start().row;
                let end = to.min(start + opened.shard.entry().rows);
                let sides = [(Side::RowToken, 4), (Side::RowPosition, 4), (Side::RowFlags, 1)];
                for (table, (side, width)) in tables.iter_mut().zip(sides) {
                    let bytes = opened.row_table(side)?;
                    let range = length(at - start) * width..length(end - start) * width;
                    table.extend_from_slice(bytes.get(range).unwrap_or_default());
                }
                if end <= at {
                    break;
                }
                at = end;
            }
            Ok(tables)
        })
    }
}

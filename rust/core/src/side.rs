//! The side tensors of a shard: rows' tokens, prompts' tables, checksums.

use crate::dtype::Dtype;
use crate::layout::Size;

/// The side tensors, in file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "named in `Side::name`, explained in docs/format.md")]
pub enum Side {
    RowToken,
    RowPosition,
    RowFlags,
    PromptRows,
    PromptLength,
    PromptIds,
    PromptTextLength,
    PromptText,
    Crc32c,
    Xxh3,
}

impl Side {
    /// Every side tensor of a shard with or without texts, in file order.
    pub fn all(texts: bool) -> impl Iterator<Item = Self> {
        [
            Self::RowToken,
            Self::RowPosition,
            Self::RowFlags,
            Self::PromptRows,
            Self::PromptLength,
            Self::PromptIds,
            Self::PromptTextLength,
            Self::PromptText,
            Self::Crc32c,
            Self::Xxh3,
        ]
        .into_iter()
        .filter(move |side| texts || !matches!(side, Self::PromptTextLength | Self::PromptText))
    }

    /// Returns the tensor's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RowToken => "#row.token",
            Self::RowPosition => "#row.position",
            Self::RowFlags => "#row.flags",
            Self::PromptRows => "#prompt.rows",
            Self::PromptLength => "#prompt.length",
            Self::PromptIds => "#prompt.ids",
            Self::PromptTextLength => "#prompt.text_length",
            Self::PromptText => "#prompt.text",
            Self::Crc32c => "#crc32c",
            Self::Xxh3 => "#xxh3",
        }
    }

    /// Returns the element type.
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::RowToken | Self::RowPosition | Self::PromptIds | Self::Crc32c => Dtype::U32,
            Self::RowFlags | Self::PromptText => Dtype::U8,
            Self::PromptRows | Self::PromptLength | Self::PromptTextLength | Self::Xxh3 => {
                Dtype::U64
            }
        }
    }

    /// Returns which of the row tables it is: token 0, position 1, flags 2.
    pub const fn row_table(self) -> Option<usize> {
        match self {
            Self::RowToken => Some(0),
            Self::RowPosition => Some(1),
            Self::RowFlags => Some(2),
            Self::PromptRows
            | Self::PromptLength
            | Self::PromptIds
            | Self::PromptTextLength
            | Self::PromptText
            | Self::Crc32c
            | Self::Xxh3 => None,
        }
    }

    /// Returns the elements of a tensor before the checksum tables.
    pub(crate) const fn elements(self, size: &Size) -> u64 {
        match self {
            Self::RowToken | Self::RowPosition | Self::RowFlags => size.rows,
            Self::PromptRows | Self::PromptLength | Self::PromptTextLength => size.prompts,
            Self::PromptIds => size.ids,
            Self::PromptText => size.text_bytes,
            Self::Crc32c | Self::Xxh3 => 0,
        }
    }
}

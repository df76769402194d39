//! Element types: each with its torch, short, safetensors and `DLPack` names. Bytes are carried,
//! never reinterpreted.

use std::ffi::CStr;
use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// An element type that a site can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the variants are the types they are named for")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bool,
    F8E4M3,
    F8E5M2,
}

/// One row of the table below.
struct Facts {
    dtype: Dtype,
    torch: &'static str,
    short: &'static str,
    safetensors: &'static str,
    size: u8,
    dlpack: (u8, u8),
    buffer: Option<&'static CStr>,
}

const fn facts(
    dtype: Dtype,
    names: (&'static str, &'static str, &'static str),
    size: u8,
    dlpack_code: u8,
    buffer: Option<&'static CStr>,
) -> Facts {
    let (torch, short, safetensors) = names;
    Facts { dtype, torch, short, safetensors, size, dlpack: (dlpack_code, size * 8), buffer }
}

/// `DLPack` codes: int 0, uint 1, float 2, bfloat 4, bool 6, `float8_e4m3fn` 10, `float8_e5m2` 12.
const TABLE: [Facts; 15] = [
    facts(Dtype::F32, ("float32", "f32", "F32"), 4, 2, Some(c"f")),
    facts(Dtype::F16, ("float16", "f16", "F16"), 2, 2, Some(c"e")),
    facts(Dtype::Bf16, ("bfloat16", "bf16", "BF16"), 2, 4, None),
    facts(Dtype::F64, ("float64", "f64", "F64"), 8, 2, Some(c"d")),
    facts(Dtype::I8, ("int8", "i8", "I8"), 1, 0, Some(c"b")),
    facts(Dtype::I16, ("int16", "i16", "I16"), 2, 0, Some(c"h")),
    facts(Dtype::I32, ("int32", "i32", "I32"), 4, 0, Some(c"i")),
    facts(Dtype::I64, ("int64", "i64", "I64"), 8, 0, Some(c"q")),
    facts(Dtype::U8, ("uint8", "u8", "U8"), 1, 1, Some(c"B")),
    facts(Dtype::U16, ("uint16", "u16", "U16"), 2, 1, Some(c"H")),
    facts(Dtype::U32, ("uint32", "u32", "U32"), 4, 1, Some(c"I")),
    facts(Dtype::U64, ("uint64", "u64", "U64"), 8, 1, Some(c"Q")),
    facts(Dtype::Bool, ("bool", "bool", "BOOL"), 1, 6, Some(c"?")),
    facts(Dtype::F8E4M3, ("float8_e4m3fn", "f8_e4m3", "F8_E4M3"), 1, 10, None),
    facts(Dtype::F8E5M2, ("float8_e5m2", "f8_e5m2", "F8_E5M2"), 1, 12, None),
];

impl Dtype {
    #[expect(clippy::indexing_slicing, reason = "the table has one row per variant, in order")]
    const fn facts(self) -> &'static Facts {
        &TABLE[self as usize]
    }

    /// Every dtype, in the order of the table in `docs/format.md`.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|facts| facts.dtype)
    }

    /// Returns the torch name, such as `bfloat16`.
    pub const fn name(self) -> &'static str {
        self.facts().torch
    }

    /// Returns the short name, such as `bf16`.
    pub const fn short(self) -> &'static str {
        self.facts().short
    }

    /// Returns the safetensors name, such as `BF16`.
    pub const fn safetensors(self) -> &'static str {
        self.facts().safetensors
    }

    /// Returns the size of one element in bytes.
    pub const fn size(self) -> u64 {
        self.facts().size as u64
    }

    /// Returns the `DLPack` type code and the bits of one element.
    pub const fn dlpack(self) -> (u8, u8) {
        self.facts().dlpack
    }

    /// Returns the buffer-protocol format, where the protocol has one.
    pub const fn buffer_format(self) -> Option<&'static CStr> {
        self.facts().buffer
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = Error;

    /// Reads a torch name (with or without `torch.`), a short or a safetensors name.
    fn from_str(text: &str) -> Result<Self, Error> {
        // A manifest has one of these per site.
        if let Some(facts) = TABLE.iter().find(|facts| facts.safetensors == text) {
            return Ok(facts.dtype);
        }
        let bare = text.strip_prefix("torch.").unwrap_or(text);
        TABLE
            .iter()
            .find(|facts| [facts.torch, facts.short, facts.safetensors].contains(&bare))
            .map(|facts| facts.dtype)
            .ok_or_else(|| Error::UnknownDtype { found: text.chars().take(64).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_stands_at_its_variant_and_every_name_reads_back() {
        for dtype in Dtype::all() {
            assert_eq!(dtype.facts().dtype, dtype);
            for name in [dtype.name(), dtype.short(), dtype.safetensors()] {
                assert_eq!(name.parse::<Dtype>().unwrap(), dtype);
            }
            assert_eq!(format!("torch.{dtype}").parse::<Dtype>().unwrap(), dtype);
        }
    }

    #[test]
    fn an_unknown_name_is_an_error_that_repeats_it() {
        let error = "float33".parse::<Dtype>().unwrap_err();
        assert!(error.to_string().contains("`float33`"), "{error}");
    }
}

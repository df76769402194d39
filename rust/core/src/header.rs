//! The safetensors header of a shard: canonical JSON in file order, then spaces.
//!
//! Its length is fixed by the sites: that of the header with every pad present and every number
//! 20 digits wide. Nothing in it depends on time, host, process or library version.

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::layout::{Layout, PAGE, Plan, Region, Tensor};
use crate::side::Side;

/// The safetensors format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The digits of the largest u64.
const WIDEST: u64 = u64::MAX;

/// Returns the bytes that the length field and the header of every shard of this plan take: a
/// multiple of 4 KiB.
///
/// # Errors
///
/// [`Error::Mismatch`] if the header would pass the safetensors format's limit of 100 MB.
pub(crate) fn reserved_bytes(plan: &Plan) -> Result<u64> {
    let pads = plan.sites().len() + Side::all(plan.texts()).count();
    let mut bytes = 8 + open(WIDEST).len() + 1;
    bytes += (0..pads).map(|index| entry_bytes(digits(index) + 7, 2, 1)).sum::<usize>();
    for site in plan.sites() {
        let dtype = site.dtype.safetensors().len();
        bytes += entry_bytes(quoted_bytes(&site.path), dtype, 1 + site.shape.len());
    }
    for side in Side::all(plan.texts()) {
        let dimensions = if side == Side::Xxh3 { 2 } else { 1 };
        let dtype = side.dtype().safetensors().len();
        bytes += entry_bytes(side.name().len() + 2, dtype, dimensions);
    }
    let bytes = (bytes as u64).next_multiple_of(PAGE);
    if bytes - 8 > MAX_HEADER_BYTES {
        return Err(Error::Mismatch {
            what: String::from("the header that these sites need"),
            expected: format!("at most {MAX_HEADER_BYTES} bytes"),
            found: format!("{bytes} bytes"),
        });
    }
    Ok(bytes)
}

/// Returns the bytes of an entry whose numbers are all 20 digits wide. `name` counts the quotes.
fn entry_bytes(name: usize, dtype: usize, dimensions: usize) -> usize {
    let fixed = r#",:{"dtype":"","shape":[],"data_offsets":[,]}"#.len();
    fixed + name + dtype + 20 * (dimensions + 2) + dimensions.saturating_sub(1)
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |power| power as usize + 1)
}

/// Returns the bytes of a name as JSON has it, quotes and escapes included.
fn quoted_bytes(name: &str) -> usize {
    let plain = name.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\');
    if plain { name.len() + 2 } else { serde_json::Value::from(name).to_string().len() }
}

/// Returns the length field and the header of a shard, spaces included.
pub(crate) fn header(plan: &Plan, layout: &Layout, head: u64) -> Vec<u8> {
    let mut json = open(head);
    for region in &layout.regions {
        let begin = region.offset - layout.header_bytes;
        let span = (begin, begin + region.bytes);
        match region.tensor {
            Tensor::Pad(index) => {
                entry(&mut json, &format!("#pad.{index}"), "U8", &[region.bytes], span);
            }
            Tensor::Site(index) => {
                if let Some(site) = plan.sites().get(index) {
                    let mut shape = vec![layout.size.rows];
                    shape.extend(&site.shape);
                    entry(&mut json, &site.path, site.dtype.safetensors(), &shape, span);
                }
            }
            Tensor::Side(side) => {
                let shape = side_shape(side, region);
                entry(&mut json, side.name(), side.dtype().safetensors(), &shape, span);
            }
        }
    }
    json.push('}');
    let mut bytes = (layout.header_bytes - 8).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    let total = usize::try_from(layout.header_bytes).unwrap_or(bytes.len());
    bytes.resize(total, b' ');
    bytes
}

fn side_shape(side: Side, region: &Region) -> Vec<u64> {
    let elements = region.bytes / side.dtype().size();
    if side == Side::Xxh3 { vec![elements / 2, 2] } else { vec![elements] }
}

fn open(head: u64) -> String {
    format!(r#"{{"__metadata__":{{"format":"lamina 1","head":"{head}"}}"#)
}

fn entry(json: &mut String, name: &str, dtype: &str, shape: &[u64], (begin, end): (u64, u64)) {
    let name = serde_json::Value::from(name);
    let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    // Writing to a String cannot fail.
    let _ = write!(
        json,
        r#",{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::layout::SiteSpec;

    /// The rule, written out: every pad present, every number as wide as can be.
    fn widest(plan: &Plan) -> u64 {
        let mut json = open(WIDEST);
        for index in 0..plan.sites().len() + Side::all(plan.texts()).count() {
            entry(&mut json, &format!("#pad.{index}"), "U8", &[WIDEST], (WIDEST, WIDEST));
        }
        for site in plan.sites() {
            let shape = vec![WIDEST; 1 + site.shape.len()];
            entry(&mut json, &site.path, site.dtype.safetensors(), &shape, (WIDEST, WIDEST));
        }
        for side in Side::all(plan.texts()) {
            let shape: &[u64] = if side == Side::Xxh3 { &[WIDEST; 2] } else { &[WIDEST] };
            entry(&mut json, side.name(), side.dtype().safetensors(), shape, (WIDEST, WIDEST));
        }
        json.push('}');
        (8 + json.len() as u64).next_multiple_of(PAGE)
    }

    #[test]
    fn the_reserved_length_is_that_of_the_widest_header() {
        for count in [0usize, 1, 2, 11, 30, 997, 1201] {
            for texts in [false, true] {
                let site = |index| SiteSpec {
                    path: format!("model.\"\u{e9}\n[{index}].output"),
                    dtype: if index % 2 == 0 { Dtype::Bf16 } else { Dtype::F8E4M3 },
                    shape: vec![2; index % 3],
                };
                let plan = Plan::new((0..count).map(site).collect(), 16, texts).unwrap();
                assert_eq!(plan.header_bytes(), widest(&plan), "{count} sites");
            }
        }
    }
}

//! The safetensors header of a shard: canonical JSON in file order, then spaces.
//!
//! Its length is fixed by the sites: that of the header with every pad present and every number
//! 20 digits wide. Nothing in it depends on time, host, process or library version.

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::layout::{Layout, PAGE, Plan, Region, Side, Tensor};

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
    let mut json = open(WIDEST);
    let tensors = plan.sites().len() + Side::all(plan.texts()).count();
    for index in 0..tensors {
        entry(
            &mut json,
            &format!("#pad.{index}"),
            "U8",
            &[WIDEST],
            (WIDEST, WIDEST),
        );
    }
    for site in plan.sites() {
        let mut shape = vec![WIDEST];
        shape.resize(1 + site.shape.len(), WIDEST);
        entry(
            &mut json,
            &site.path,
            site.dtype.safetensors(),
            &shape,
            (WIDEST, WIDEST),
        );
    }
    for side in Side::all(plan.texts()) {
        let shape: &[u64] = if side == Side::Xxh3 {
            &[WIDEST, WIDEST]
        } else {
            &[WIDEST]
        };
        entry(
            &mut json,
            side.name(),
            side.dtype().safetensors(),
            shape,
            (WIDEST, WIDEST),
        );
    }
    json.push('}');
    let bytes = (8 + json.len() as u64).next_multiple_of(PAGE);
    if bytes - 8 > MAX_HEADER_BYTES {
        return Err(Error::Mismatch {
            what: String::from("the header that these sites need"),
            expected: format!("at most {MAX_HEADER_BYTES} bytes"),
            found: format!("{bytes} bytes"),
        });
    }
    Ok(bytes)
}

/// Returns the length field and the header of a shard, spaces included.
pub(crate) fn header(plan: &Plan, layout: &Layout, head: u64) -> Vec<u8> {
    let mut json = open(head);
    for region in &layout.regions {
        let begin = region.offset - layout.header_bytes;
        let span = (begin, begin + region.bytes);
        match region.tensor {
            Tensor::Pad(index) => {
                entry(
                    &mut json,
                    &format!("#pad.{index}"),
                    "U8",
                    &[region.bytes],
                    span,
                );
            }
            Tensor::Site(index) => {
                if let Some(site) = plan.sites().get(index) {
                    let mut shape = vec![layout.size.rows];
                    shape.extend(&site.shape);
                    entry(
                        &mut json,
                        &site.path,
                        site.dtype.safetensors(),
                        &shape,
                        span,
                    );
                }
            }
            Tensor::Side(side) => {
                let shape = side_shape(side, region);
                entry(
                    &mut json,
                    side.name(),
                    side.dtype().safetensors(),
                    &shape,
                    span,
                );
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
    if side == Side::Xxh3 {
        vec![elements / 2, 2]
    } else {
        vec![elements]
    }
}

fn open(head: u64) -> String {
    format!(r#"{{"__metadata__":{{"format":"lamina 1","head":"{head}"}}"#)
}

fn entry(json: &mut String, name: &str, dtype: &str, shape: &[u64], (begin, end): (u64, u64)) {
    let name = serde_json::Value::from(name);
    let shape = shape
        .iter()
        .map(u64::to_string)
        .collect::<Vec<_>>()
        .join(",");
    // Writing to a String cannot fail.
    let _ = write!(
        json,
        r#",{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#
    );
}

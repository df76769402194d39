//! The arithmetic of a shard: where each tensor lies. The only place where offsets exist.
//!
//! A [`Plan`] (sites, rows per full shard) and a [`Size`] (rows, prompts, ids, text) decide every
//! offset; nothing is read to find a region, and the header is generated from the same numbers.

use crate::checksum::{BLOCK_BYTES, block_rows};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::side::Side;
use crate::tier::{MAX_REGION_ALIGNMENT, Tier};

/// The most rows a shard has.
pub const MAX_ROWS: u64 = 1 << 20;
/// The default for the bytes of a full shard's rows.
pub const SHARD_BYTES: u64 = 1 << 30;
/// Bytes of the row tables per row: token, position (u32 each), flags (u8).
pub const ROW_TABLE_BYTES: u64 = 9;
/// The header, and the regions of short shards and of the copy tier, start at multiples of this.
pub const PAGE: u64 = 4096;
/// The largest mapping tier: the page size that the kernel can use for the page cache.
pub const HUGE_PAGE: u64 = 2 << 20;
/// Side tensors start at multiples of this.
const SIDE_ALIGNMENT: u64 = 8;

/// A site as the store records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteSpec {
    /// The canonical path.
    pub path: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape of one row.
    pub shape: Vec<u64>,
}

impl SiteSpec {
    /// Returns the bytes of one row.
    ///
    /// # Errors
    ///
    /// [`Error::Site`] if a dimension is zero or the product overflows.
    pub fn row_bytes(&self) -> Result<u64> {
        let site = |found: String| Error::Site { path: self.path.clone(), found };
        if self.shape.contains(&0) {
            return Err(site(format!("its feature shape {:?} has a zero", self.shape)));
        }
        self.shape
            .iter()
            .try_fold(self.dtype.size(), |bytes, &dimension| bytes.checked_mul(dimension))
            .filter(|&bytes| bytes <= MAX_ROW_BYTES)
            .ok_or_else(|| {
                site(format!("a row of shape {:?} is over {MAX_ROW_BYTES} bytes", self.shape))
            })
    }
}

/// A row is at most this: with [`MAX_ROWS`] rows a region then stays below 2^60 bytes.
const MAX_ROW_BYTES: u64 = 1 << 40;

/// What all shards of a group have in common.
#[derive(Clone, Debug)]
pub struct Plan {
    sites: Vec<SiteSpec>,
    row_bytes: Vec<u64>,
    rows_per_shard: u64,
    texts: bool,
    header_bytes: u64,
}

/// What decides one shard's layout, beside its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Size {
    /// Rows.
    pub rows: u64,
    /// Prompts whose table entry lies here.
    pub prompts: u64,
    /// Token ids of these prompts.
    pub ids: u64,
    /// Bytes of these prompts' texts.
    pub text_bytes: u64,
}

/// A tensor of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tensor {
    /// Zeros that fill what the alignment of the following tensor needs.
    Pad(usize),
    /// The rows of a site.
    Site(usize),
    /// A side tensor.
    Side(Side),
}

/// Returns a path that two sites have, if there is one.
fn repeated(sites: &[SiteSpec]) -> Option<String> {
    // Hashes sort faster than texts; texts decide only where hashes meet.
    let hash = |site: &SiteSpec| xxhash_rust::xxh3::xxh3_64(site.path.as_bytes());
    let mut hashed: Vec<(u64, &str)> =
        sites.iter().map(|site| (hash(site), site.path.as_str())).collect();
    hashed.sort_unstable();
    let twice = |pair: &&[(u64, &str)]| matches!(pair, [first, second] if first == second);
    hashed.windows(2).find(twice).and_then(|pair| pair.first()).map(|(_, path)| (*path).to_owned())
}

/// Where one tensor lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Which tensor.
    pub tensor: Tensor,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// Index of its first CRC in `#crc32c`; meaningless for the checksum tables.
    pub first_crc: u64,
    /// Bytes of a checksum block.
    pub block_bytes: u64,
}

impl Region {
    /// Returns how many checksum blocks it has.
    pub const fn blocks(&self) -> u64 {
        self.bytes.div_ceil(self.block_bytes)
    }
}

/// Every region of one shard, in file order, pads included.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The size it was made for.
    pub size: Size,
    /// The regions, in file order.
    pub regions: Vec<Region>,
    /// Index into `regions` of each site.
    sites: Vec<usize>,
    /// Index into `regions` of each side tensor.
    sides: Vec<(Side, usize)>,
    /// Bytes of the length field and the header.
    pub header_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Layout {
    /// Returns the region of a site.
    pub fn site(&self, index: usize) -> Option<&Region> {
        self.regions.get(*self.sites.get(index)?)
    }

    /// Returns the region of a side tensor, where this store has it.
    pub fn side(&self, side: Side) -> Option<&Region> {
        let (_, index) = self.sides.iter().find(|(named, _)| *named == side)?;
        self.regions.get(*index)
    }

    /// Returns the regions that have checksums: all before `#crc32c`, pads too.
    pub fn checked(&self) -> impl Iterator<Item = &Region> {
        self.regions
            .iter()
            .take_while(|region| region.tensor != Tensor::Side(Side::Crc32c))
            .take(self.checked_len())
    }

    /// Returns how many regions have checksums (the pad before `#crc32c` is the last of them).
    fn checked_len(&self) -> usize {
        self.sides.iter().find(|(side, _)| *side == Side::Crc32c).map_or(0, |&(_, index)| index)
    }
}

fn too_large(what: &str) -> Error {
    Error::Mismatch {
        what: format!("the size of {what}"),
        expected: String::from("less than 2^63 bytes"),
        found: String::from("more"),
    }
}

/// Returns the largest power of two of rows, at most [`MAX_ROWS`], whose bytes (row tables
/// counted) are at most `shard_bytes`; one at least.
///
/// # Errors
///
/// [`Error::Site`] for a site that cannot be stored.
pub fn rows_per_shard(sites: &[SiteSpec], shard_bytes: u64) -> Result<u64> {
    let mut bytes = ROW_TABLE_BYTES;
    for site in sites {
        bytes = bytes.checked_add(site.row_bytes()?).ok_or_else(|| too_large("one row"))?;
    }
    let rows = (shard_bytes / bytes).clamp(1, MAX_ROWS);
    Ok(1 << rows.ilog2())
}

impl Plan {
    /// Returns the plan for these sites.
    ///
    /// # Errors
    ///
    /// [`Error::Site`] for a site that cannot be stored (empty, reserved or repeated name, size);
    /// [`Error::Mismatch`] if `rows_per_shard` is no power of two up to [`MAX_ROWS`] or a full
    /// shard would overflow.
    pub fn new(sites: Vec<SiteSpec>, rows_per_shard: u64, texts: bool) -> Result<Self> {
        if !rows_per_shard.is_power_of_two() || rows_per_shard > MAX_ROWS {
            return Err(Error::Mismatch {
                what: String::from("rows per shard"),
                expected: format!("a power of two up to {MAX_ROWS}"),
                found: rows_per_shard.to_string(),
            });
        }
        let row_bytes = sites.iter().map(SiteSpec::row_bytes).collect::<Result<Vec<_>>>()?;
        if let Some(path) = repeated(&sites) {
            let found = String::from("it is named twice");
            return Err(Error::Site { path, found });
        }
        for site in &sites {
            if site.path.is_empty() || site.path.starts_with('#') || site.path == "__metadata__" {
                return Err(Error::Site {
                    path: site.path.clone(),
                    found: String::from("the name is empty or reserved"),
                });
            }
        }
        let mut plan = Self { sites, row_bytes, rows_per_shard, texts, header_bytes: 0 };
        plan.header_bytes = crate::header::reserved_bytes(&plan)?;
        // What a full shard's regions take at most, so that `layout` can only fail for its prompts.
        plan.row_bytes
            .iter()
            .try_fold(plan.header_bytes, |sum, &bytes| {
                let region = bytes.checked_mul(rows_per_shard)?;
                sum.checked_add(region)?.checked_add(MAX_REGION_ALIGNMENT)
            })
            .filter(|&bytes| bytes < 1 << 62)
            .ok_or_else(|| too_large("a full shard"))?;
        Ok(plan)
    }

    /// Returns the sites, in file order.
    pub fn sites(&self) -> &[SiteSpec] {
        &self.sites
    }

    /// Returns the bytes of one row of a site.
    pub fn row_bytes(&self, site: usize) -> u64 {
        self.row_bytes.get(site).copied().unwrap_or(0)
    }

    /// Returns R, the rows of a full shard.
    pub fn rows_per_shard(&self) -> u64 {
        self.rows_per_shard
    }

    /// Returns whether prompts carry their text.
    pub fn texts(&self) -> bool {
        self.texts
    }

    /// Returns the bytes of a shard's length field and header.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Returns how a site's column is mapped.
    pub fn tier(&self, site: usize) -> Tier {
        Tier::of(self.rows_per_shard.saturating_mul(self.row_bytes(site)))
    }

    /// Returns where every tensor of a shard of this size lies.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the file would have 2^63 bytes or more, or more than R rows.
    pub fn layout(&self, size: &Size) -> Result<Layout> {
        if size.rows > self.rows_per_shard {
            return Err(Error::Mismatch {
                what: String::from("rows of a shard"),
                expected: format!("at most {}", self.rows_per_shard),
                found: size.rows.to_string(),
            });
        }
        let full = size.rows == self.rows_per_shard;
        let mut builder = Builder {
            regions: Vec::with_capacity(2 * self.sites.len() + 20),
            offset: self.header_bytes,
            crc: 0,
            tensors: 0,
        };
        let mut sites = Vec::with_capacity(self.sites.len());
        for (site, &row_bytes) in self.row_bytes.iter().enumerate() {
            let alignment = if full { self.tier(site).alignment() } else { PAGE };
            let bytes = size.rows.checked_mul(row_bytes).ok_or_else(|| too_large("a shard"))?;
            let block_bytes = block_rows(row_bytes) * row_bytes;
            sites.push(builder.add(Tensor::Site(site), alignment, bytes, block_bytes)?);
        }
        let mut side_tensors = Vec::with_capacity(10);
        for side in Side::all(self.texts) {
            let bytes = match side {
                Side::Crc32c => {
                    // The pad before the table has a checksum too, so it is added first.
                    builder.align(SIDE_ALIGNMENT)?;
                    builder.crc.checked_mul(4)
                }
                Side::Xxh3 => {
                    let checked = builder
                        .regions
                        .iter()
                        .take_while(|region| region.tensor != Tensor::Side(Side::Crc32c))
                        .count() as u64;
                    checked.checked_mul(16)
                }
                Side::RowToken
                | Side::RowPosition
                | Side::RowFlags
                | Side::PromptRows
                | Side::PromptLength
                | Side::PromptIds
                | Side::PromptTextLength
                | Side::PromptText => side.elements(size).checked_mul(side.dtype().size()),
            };
            let bytes = bytes.ok_or_else(|| too_large("a shard"))?;
            let at = builder.add(Tensor::Side(side), SIDE_ALIGNMENT, bytes, BLOCK_BYTES)?;
            side_tensors.push((side, at));
        }
        let file_bytes = builder.offset;
        if file_bytes >= 1 << 63 {
            return Err(too_large("a shard"));
        }
        let regions = builder.regions;
        Ok(Layout {
            size: *size,
            regions,
            sites,
            sides: side_tensors,
            header_bytes: self.header_bytes,
            file_bytes,
        })
    }
}

struct Builder {
    regions: Vec<Region>,
    offset: u64,
    crc: u64,
    tensors: usize,
}

impl Builder {
    /// Adds the pad that brings the end to a multiple of `alignment`, if one is needed.
    fn align(&mut self, alignment: u64) -> Result<()> {
        let pad = self.offset.next_multiple_of(alignment) - self.offset;
        if pad > 0 {
            self.push(Tensor::Pad(self.tensors), pad, BLOCK_BYTES)?;
        }
        Ok(())
    }

    fn add(&mut self, tensor: Tensor, alignment: u64, bytes: u64, block: u64) -> Result<usize> {
        self.align(alignment)?;
        self.push(tensor, bytes, block)?;
        self.tensors += 1;
        Ok(self.regions.len() - 1)
    }

    fn push(&mut self, tensor: Tensor, bytes: u64, block_bytes: u64) -> Result<()> {
        let region =
            Region { tensor, offset: self.offset, bytes, first_crc: self.crc, block_bytes };
        self.crc += region.blocks();
        self.offset = self
            .offset
            .checked_add(bytes)
            .filter(|&end| end < 1 << 63)
            .ok_or_else(|| too_large("a shard"))?;
        self.regions.push(region);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Vec<SiteSpec> {
        vec![
            SiteSpec { path: "model.a.output".into(), dtype: Dtype::Bf16, shape: vec![576] },
            SiteSpec { path: "model.b.output".into(), dtype: Dtype::I8, shape: vec![] },
        ]
    }

    #[test]
    fn regions_follow_each_other_without_holes_and_are_aligned() {
        let plan = Plan::new(sites(), 4096, true).unwrap();
        for size in [
            Size { rows: 4096, prompts: 3, ids: 5001, text_bytes: 77 },
            Size { rows: 17, prompts: 2, ids: 40, text_bytes: 1 },
            Size::default(),
        ] {
            let layout = plan.layout(&size).unwrap();
            let mut at = layout.header_bytes;
            for region in &layout.regions {
                assert_eq!(region.offset, at);
                at += region.bytes;
            }
            assert_eq!(at, layout.file_bytes);
            for site in 0..2 {
                assert_eq!(layout.site(site).unwrap().offset % PAGE, 0);
            }
            for side in Side::all(true) {
                assert_eq!(layout.side(side).unwrap().offset % SIDE_ALIGNMENT, 0);
            }
            let checked = layout.checked().count() as u64;
            assert_eq!(layout.side(Side::Xxh3).unwrap().bytes, 16 * checked);
            let blocks: u64 = layout.checked().map(Region::blocks).sum();
            assert_eq!(layout.side(Side::Crc32c).unwrap().bytes, 4 * blocks);
        }
    }

    #[test]
    fn full_shards_have_the_same_site_offsets_whatever_their_prompts() {
        let plan = Plan::new(sites(), 1024, false).unwrap();
        let one = plan.layout(&Size { rows: 1024, prompts: 1, ids: 9, text_bytes: 0 }).unwrap();
        let two =
            plan.layout(&Size { rows: 1024, prompts: 800, ids: 4000, text_bytes: 0 }).unwrap();
        for site in 0..2 {
            assert_eq!(one.site(site), two.site(site));
        }
    }

    #[test]
    fn tiers_follow_from_the_region_of_a_full_shard() {
        let tier = |bytes: u64, rows: u64| {
            let site = SiteSpec { path: "x".into(), dtype: Dtype::U8, shape: vec![bytes] };
            Plan::new(vec![site], rows, false).unwrap().tier(0)
        };
        assert_eq!(tier(1536, 4096), Tier::Huge);
        assert_eq!(tier(16, 4096), Tier::Large);
        assert_eq!(tier(1, 4096), Tier::Page);
        assert_eq!(tier(3, 512), Tier::Copy);
    }

    #[test]
    fn rows_per_shard_is_the_largest_power_of_two_within_the_bytes() {
        let thirty: Vec<_> = (0..30)
            .map(|layer| SiteSpec {
                path: format!("model.layers[{layer}].output"),
                dtype: Dtype::Bf16,
                shape: vec![576],
            })
            .collect();
        assert_eq!(rows_per_shard(&thirty, SHARD_BYTES).unwrap(), 16_384);
        assert_eq!(rows_per_shard(&[], SHARD_BYTES).unwrap(), MAX_ROWS);
        assert_eq!(rows_per_shard(&thirty, 1).unwrap(), 1);
        // The row tables count: 7 + 9 bytes a row, 16 rows in 256 bytes.
        let seven = [SiteSpec { path: "x".into(), dtype: Dtype::U8, shape: vec![7] }];
        assert_eq!(rows_per_shard(&seven, 256).unwrap(), 16);
        assert_eq!(rows_per_shard(&seven, 255).unwrap(), 8);
    }

    #[test]
    fn sizes_that_overflow_are_errors() {
        let huge = SiteSpec { path: "x".into(), dtype: Dtype::F64, shape: vec![u64::MAX, 2] };
        assert!(Plan::new(vec![huge], 1024, false).is_err());
        let zero = SiteSpec { path: "x".into(), dtype: Dtype::F64, shape: vec![4, 0] };
        assert!(Plan::new(vec![zero], 1024, false).is_err());
        let plan = Plan::new(sites(), 1024, false).unwrap();
        let size = Size { rows: 5, prompts: u64::MAX, ids: u64::MAX, text_bytes: 0 };
        assert!(plan.layout(&size).is_err());
    }
}

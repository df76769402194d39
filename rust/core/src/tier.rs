//! Mapping tiers: how well a column's regions suit the page sizes of the kernel.

use crate::layout::{HUGE_PAGE, PAGE};

/// Regions of a full shard start at multiples of at most this.
pub(crate) const MAX_REGION_ALIGNMENT: u64 = 64 << 10;

/// How a site's column can be mapped: what its region in a full shard is a multiple of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// A multiple of 2 MiB: huge pages.
    Huge,
    /// A multiple of 64 KiB.
    Large,
    /// A multiple of 4 KiB.
    Page,
    /// None of these: a column over several shards is copied.
    Copy,
}

impl Tier {
    /// Returns the tier of a site whose region in a full shard has `region_bytes`.
    pub(crate) fn of(region_bytes: u64) -> Self {
        if region_bytes.is_multiple_of(HUGE_PAGE) {
            Self::Huge
        } else if region_bytes.is_multiple_of(MAX_REGION_ALIGNMENT) {
            Self::Large
        } else if region_bytes.is_multiple_of(PAGE) {
            Self::Page
        } else {
            Self::Copy
        }
    }

    /// Returns what regions of full shards start at multiples of.
    pub(crate) const fn alignment(self) -> u64 {
        match self {
            Self::Huge | Self::Large => MAX_REGION_ALIGNMENT,
            Self::Page | Self::Copy => PAGE,
        }
    }

    /// Returns the name that `info` prints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Huge => "2 MiB",
            Self::Large => "64 KiB",
            Self::Page => "4 KiB",
            Self::Copy => "copy",
        }
    }
}

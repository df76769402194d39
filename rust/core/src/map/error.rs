//! Why memory could not be had: a refusal of the system, with the setting behind it.

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use thiserror::Error;

/// A count of mappings this close to `vm.max_map_count` explains a refusal: one request can need
/// several, and other threads come and go.
const MAP_COUNT_MARGIN: u64 = 64;

/// Why memory could not be had, or a request for it made no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// Address space is counted as if it were memory.
    #[error(
        "cannot reserve {length_bytes} bytes of addresses: `vm.overcommit_memory` is 2, which \
         counts them as memory in use; needed: 0 or 1"
    )]
    Overcommit {
        /// What was asked for.
        length_bytes: usize,
        /// What the system said.
        source: Errno,
    },
    /// The process has as many mappings as the system allows.
    #[error(
        "cannot map {length_bytes} bytes: this process has {count} mappings and \
         `vm.max_map_count` is {limit}"
    )]
    MapCount {
        /// What was asked for.
        length_bytes: usize,
        /// Mappings of the process, about.
        count: u64,
        /// The system's limit.
        limit: u64,
        /// What the system said.
        source: Errno,
    },
    /// The process may not have more addresses.
    #[error(
        "cannot map {length_bytes} bytes: the process is limited to {limit_bytes} bytes of \
         addresses (`ulimit -v`, RLIMIT_AS)"
    )]
    AddressSpace {
        /// What was asked for.
        length_bytes: usize,
        /// The process's limit.
        limit_bytes: u64,
        /// What the system said.
        source: Errno,
    },
    /// The system refused for another reason.
    #[error("cannot map {length_bytes} bytes: {source}")]
    System {
        /// What was asked for.
        length_bytes: usize,
        /// What the system said.
        source: Errno,
    },
    /// No address range can have this length.
    #[error("cannot map {length_bytes} bytes: longer than any address range")]
    TooLong {
        /// What was asked for.
        length_bytes: u64,
    },
    /// A file does not reach as far as what was to be mapped of it.
    #[error("cannot map a file up to byte {end}: its size is {size_bytes}")]
    BeyondFile {
        /// Where the part asked for ends.
        end: u64,
        /// The file's size.
        size_bytes: u64,
    },
    /// A part lies outside the range that it should lie in.
    #[error("byte {end} lies outside a range of {length_bytes} bytes")]
    BeyondRange {
        /// Where the part asked for ends.
        end: usize,
        /// The range's length.
        length_bytes: usize,
    },
    /// The processor maps whole pages only.
    #[error("offset {offset} is not a multiple of the page size {page_bytes}")]
    Unaligned {
        /// An offset in a file or in a range.
        offset: u64,
        /// The page size of this machine.
        page_bytes: usize,
    },
}

impl MapError {
    /// Returns the system's error, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match *self {
            Self::Overcommit { source, .. }
            | Self::MapCount { source, .. }
            | Self::AddressSpace { source, .. }
            | Self::System { source, .. } => Some(source),
            Self::TooLong { .. }
            | Self::BeyondFile { .. }
            | Self::BeyondRange { .. }
            | Self::Unaligned { .. } => None,
        }
    }
}

/// Returns what a refusal of `length_bytes` by the system means, as things stand now.
pub(super) fn refused(source: Errno, length_bytes: usize) -> MapError {
    explain(source, length_bytes, &Limits::read())
}

/// The settings that explain why the system refuses memory.
#[derive(Clone, Copy, Debug)]
struct Limits {
    overcommit: Option<u64>,
    map_count: u64,
    max_map_count: Option<u64>,
    address_space_bytes: Option<u64>,
}

impl Limits {
    /// Reads what holds for this process now.
    fn read() -> Self {
        let setting =
            |path: &str| -> Option<u64> { std::fs::read_to_string(path).ok()?.trim().parse().ok() };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self {
            overcommit: setting("/proc/sys/vm/overcommit_memory"),
            map_count: maps.lines().count() as u64,
            max_map_count: setting("/proc/sys/vm/max_map_count"),
            address_space_bytes: getrlimit(Resource::As).current,
        }
    }
}

/// Names the setting behind a refusal of `length_bytes`, where one explains it.
fn explain(source: Errno, length_bytes: usize, limits: &Limits) -> MapError {
    if source != Errno::NOMEM {
        return MapError::System { length_bytes, source };
    }
    let Limits { overcommit, map_count: count, max_map_count, address_space_bytes } = *limits;
    match (max_map_count, overcommit, address_space_bytes) {
        (Some(limit), _, _) if count.saturating_add(MAP_COUNT_MARGIN) >= limit => {
            MapError::MapCount { length_bytes, count, limit, source }
        }
        (_, Some(2), _) => MapError::Overcommit { length_bytes, source },
        (_, _, Some(limit_bytes)) => MapError::AddressSpace { length_bytes, limit_bytes, source },
        (_, _, None) => MapError::System { length_bytes, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Limits = Limits {
        overcommit: Some(0),
        map_count: 100,
        max_map_count: Some(65_530),
        address_space_bytes: None,
    };

    #[test]
    fn a_refusal_names_the_setting_behind_it() {
        let said = |limits| explain(Errno::NOMEM, 4096, &limits).to_string();
        assert_eq!(
            said(Limits { overcommit: Some(2), ..FREE }),
            "cannot reserve 4096 bytes of addresses: `vm.overcommit_memory` is 2, which counts \
             them as memory in use; needed: 0 or 1"
        );
        assert_eq!(
            said(Limits { map_count: 65_531, ..FREE }),
            "cannot map 4096 bytes: this process has 65531 mappings and `vm.max_map_count` is 65530"
        );
        assert_eq!(
            said(Limits { address_space_bytes: Some(8192), ..FREE }),
            "cannot map 4096 bytes: the process is limited to 8192 bytes of addresses \
             (`ulimit -v`, RLIMIT_AS)"
        );
        assert_eq!(explain(Errno::NOMEM, 4096, &FREE).errno(), Some(Errno::NOMEM));
        let other = explain(Errno::NODEV, 4096, &Limits { overcommit: Some(2), ..FREE });
        assert_eq!(other, MapError::System { length_bytes: 4096, source: Errno::NODEV });
    }
}

//! Memory: file mappings, and address ranges that other libraries may keep.
//!
//! This module promises that
//!
//! - a range is unmapped exactly once, when its last owner goes, and nothing else is unmapped;
//! - [`ReadMap`] is for this library's own reading and has no writable address to hand out;
//! - [`OwnedMap`] is the only place where a range is filled, and has one owner while it is;
//! - [`SharedMap`] never gives a Rust reference to its bytes, because the libraries that it was
//!   exported to may write to them at any time; it has an address and copies out;
//! - no write, by whomever, reaches a file: every mapping of a file is private.
//!
//! What it relies on, kept by `disk` and the store: a published file is never written to and never
//! becomes shorter (`docs/format.md`). A file that someone else truncates is a `SIGBUS`.
//!
//! Linux only, like `disk`: another system is a port of these two files.
#![expect(unsafe_code, reason = "memory mappings; one operation a block, each with its invariant")]

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!(
    "lamina runs on Linux (x86-64 and aarch64); another system needs its own `map.rs` and `disk.rs`"
);

mod error;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::c_void;
use std::num::NonZero;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

pub use self::error::MapError;
use self::error::refused;

/// What huge pages are aligned to: base addresses are congruent to file offsets modulo this.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Fresh memory up to this size comes from the heap: a mapping costs two system calls and a page
/// fault per page, more than such a result itself.
const HEAP_LIMIT_BYTES: usize = 128 << 10;

/// Fresh memory from this size on asks for huge pages (`NumPy` draws the line at the same size).
const ADVISE_LIMIT_BYTES: usize = 4 << 20;

/// Alignment of every non-empty base address; `jax` takes memory over only if it is 64-aligned.
const BASE_ALIGNMENT_BYTES: NonZero<usize> = NonZero::new(64).unwrap();

type Result<T> = std::result::Result<T, MapError>;

/// Returns the page size; what [`OwnedMap::place`] takes are multiples of it.
pub fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// A whole file, read-only, for this library's own reading; never exported.
#[derive(Debug)]
pub struct ReadMap(Block);

impl ReadMap {
    /// Maps the first `length_bytes` of `file`; from 2 MiB on at an address that huge pages can use.
    ///
    /// # Errors
    ///
    /// [`MapError::BeyondFile`] where the file is shorter, else whatever the system refuses.
    pub fn new(file: BorrowedFd<'_>, length_bytes: u64) -> Result<Self> {
        let length = range_length(length_bytes)?;
        if length == 0 {
            return Ok(Self(Block::empty()));
        }
        let protection = ProtFlags::empty(); // nothing to see until the file is there
        let congruent = (length >= HUGE_PAGE_BYTES).then_some(0);
        let mut block = Block::reserve(length, congruent, protection)?;
        block.place(0, file, 0, length, ProtFlags::READ)?;
        Ok(Self(block))
    }

    /// Returns the file's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `Block` keeps `length` readable, initialised bytes at `base` as long as it lives;
        // nothing writes to them: the file is published (see the module), the pages are read-only.
        unsafe { std::slice::from_raw_parts(self.0.base.as_ptr(), self.0.length) }
    }
}

/// Memory that is being filled and that nobody else has yet; [`OwnedMap::share`] ends that.
#[derive(Debug)]
pub struct OwnedMap {
    block: Block,
    /// Made by [`OwnedMap::reserve`]: views of it stand for what is stored.
    is_column: bool,
}

impl OwnedMap {
    /// Returns fresh zeroed memory that will belong to whoever it is handed to.
    ///
    /// # Errors
    ///
    /// [`MapError::TooLong`], else whatever the system refuses.
    pub fn anonymous(length_bytes: usize) -> Result<Self> {
        let length = range_length(length_bytes as u64)?;
        let block = if length == 0 {
            Block::empty()
        } else if length <= HEAP_LIMIT_BYTES {
            Block::heap(length)?
        } else if length < ADVISE_LIMIT_BYTES {
            Block::reserve(length, None, ProtFlags::READ | ProtFlags::WRITE)?
        } else {
            let block = Block::reserve(length, Some(0), ProtFlags::READ | ProtFlags::WRITE)?;
            block.advise_huge_pages();
            block
        };
        Ok(Self { block, is_column: false })
    }

    /// Reserves addresses for a column of `length_bytes`, to [`place`](Self::place) files in.
    ///
    /// The base is congruent to `congruent` modulo 2 MiB. Where nothing is placed there are zeros;
    /// they cost no memory until they are written to.
    ///
    /// # Errors
    ///
    /// [`MapError::Unaligned`] where `congruent` is not a multiple of the page size,
    /// [`MapError::TooLong`], [`MapError::Overcommit`], else whatever the system refuses.
    pub fn reserve(length_bytes: usize, congruent: u64) -> Result<Self> {
        page_multiple(congruent)?;
        let length = range_length(length_bytes as u64)?;
        let block = if length == 0 {
            Block::empty()
        } else {
            let congruent = usize::try_from(congruent % HUGE_PAGE_BYTES as u64).unwrap_or(0);
            Block::reserve(length, Some(congruent), ProtFlags::READ | ProtFlags::WRITE)?
        };
        Ok(Self { block, is_column: true })
    }

    /// Maps `length_bytes` of `file` from `offset`, privately, at `at` in this range.
    ///
    /// Whole pages are mapped: the last one shows what follows in the file (zeros after its end),
    /// and may be written over like the rest of the range. The part must lie inside a range made by
    /// [`reserve`](Self::reserve); one of 0 bytes maps nothing.
    ///
    /// # Errors
    ///
    /// [`MapError::Unaligned`], [`MapError::BeyondRange`] and [`MapError::BeyondFile`] leave the
    /// range as it was. After a refusal by the system it ends at `at`.
    pub fn place(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        length_bytes: usize,
    ) -> Result<()> {
        page_multiple(at as u64)?;
        page_multiple(offset)?;
        if length_bytes == 0 {
            return Ok(());
        }
        if !self.is_column {
            let end = at.saturating_add(length_bytes);
            return Err(MapError::BeyondRange { end, length_bytes: 0 });
        }
        self.block.place(at, file, offset, length_bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Returns the bytes, to read back what was filled in.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `Block` keeps `length` readable, initialised bytes at `base` as long as it lives;
        // they have one owner, which is borrowed here, and the address has not been given away.
        unsafe { std::slice::from_raw_parts(self.block.base.as_ptr(), self.block.length) }
    }

    /// Returns the bytes, to fill in.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; every page of an `OwnedMap` is writable, and the owner is borrowed
        // mutably here.
        unsafe { std::slice::from_raw_parts_mut(self.block.base.as_ptr(), self.block.length) }
    }

    /// Ends the filling: from here on other libraries may hold the memory and write to it.
    pub fn share(self) -> SharedMap {
        SharedMap { block: self.block, is_column: self.is_column }
    }
}

/// Memory that other libraries may hold and write to; Rust sees an address and copies out.
#[derive(Debug)]
pub struct SharedMap {
    block: Block,
    is_column: bool,
}

impl SharedMap {
    /// Returns the base address, valid as long as this object; dangling where there are 0 bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.block.base.as_ptr()
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.block.length
    }

    /// Returns whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.block.length == 0
    }

    /// Returns whether views of this memory stand for what is stored, so that a library which
    /// knows read-only memory should be told so. Writing is harmless in any case.
    pub fn is_column(&self) -> bool {
        self.is_column
    }

    /// Copies the bytes from `offset` into `out`, as they are at this moment.
    ///
    /// # Errors
    ///
    /// [`MapError::BeyondRange`] where they do not reach that far.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(out.len());
        if end > self.block.length {
            return Err(MapError::BeyondRange { end, length_bytes: self.block.length });
        }
        let from = self.block.base.as_ptr().wrapping_add(offset);
        // SAFETY: `offset..end` lies in the `length` readable bytes at `base` (checked above), which
        // `Block` keeps; `out` is exclusive, so it is not part of them. No reference to the source
        // is made: a concurrent writer can only change which bytes are copied.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }
}

/// What becomes of a block's addresses.
#[derive(Debug)]
enum Release {
    /// There are none.
    Nothing,
    /// So many bytes from the base, whole pages, are mapped and are ours.
    Unmap(usize),
    /// The base came from the heap with this layout.
    Free(Layout),
}

/// Addresses with one owner. Invariant: `length` initialised bytes at `base` are readable, and
/// writable unless the block belongs to a [`ReadMap`], until the block is dropped.
#[derive(Debug)]
struct Block {
    base: NonNull<u8>,
    length: usize,
    release: Release,
}

// SAFETY: a block is a range of addresses that belongs to the process, not to a thread; its methods
// that write take `&mut self`, and the kernel's and the allocator's calls work from any thread.
unsafe impl Send for Block {}
// SAFETY: as above; through `&Block` nothing is written.
unsafe impl Sync for Block {}

impl Block {
    fn empty() -> Self {
        Self {
            base: NonNull::without_provenance(BASE_ALIGNMENT_BYTES),
            length: 0,
            release: Release::Nothing,
        }
    }

    /// Zeroed memory from the heap; `length` is not 0.
    fn heap(length: usize) -> Result<Self> {
        let no_memory = || refused(Errno::NOMEM, length);
        let layout = Layout::from_size_align(length, BASE_ALIGNMENT_BYTES.get());
        let layout = layout.map_err(|_| no_memory())?;
        debug_assert!(layout.size() > 0, "the callers handle 0 bytes");
        // SAFETY: the layout has a size other than 0, seen to by the callers.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or_else(no_memory)?;
        Ok(Self { base, length, release: Release::Free(layout) })
    }

    /// Fresh private pages for `length` bytes (not 0), with `congruent` at a base congruent to it
    /// modulo [`HUGE_PAGE_BYTES`]; `congruent` is a multiple of the page size.
    fn reserve(length: usize, congruent: Option<usize>, protection: ProtFlags) -> Result<Self> {
        let too_long = MapError::TooLong { length_bytes: length as u64 };
        let pages = round_up(length).ok_or(too_long)?;
        let slack = congruent.map_or(0, |_| HUGE_PAGE_BYTES);
        let whole = pages.checked_add(slack).ok_or(too_long)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: with a null address the kernel picks addresses that nothing uses.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), whole, protection, flags) };
        let fail = |errno| refused(errno, length);
        let start = start.map_err(fail)?.cast::<u8>();
        let head = match congruent {
            Some(congruent) => congruent.wrapping_sub(start.addr()) % HUGE_PAGE_BYTES,
            None => 0,
        };
        let base = start.wrapping_add(head);
        // What is not needed goes back at once, so that a placed file is one mapping, not three.
        // Should the kernel refuse that, unused addresses stay behind.
        let trim = |from: *mut u8, bytes: usize| {
            if bytes == 0 {
                return Ok(());
            }
            // SAFETY: both parts lie inside `whole` fresh pages at `start` and outside the `pages`
            // that are kept; this function has them to itself.
            unsafe { munmap(from.cast::<c_void>(), bytes) }
        };
        trim(start, head).map_err(fail)?;
        trim(base.wrapping_add(pages), slack - head).map_err(fail)?;
        let base = NonNull::new(base).ok_or_else(|| fail(Errno::FAULT))?;
        Ok(Self { base, length, release: Release::Unmap(pages) })
    }

    /// Replaces the pages at `at` by those of `file`; `at` and `offset` are multiples of the page
    /// size, `length` is not 0.
    fn place(
        &mut self,
        at: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        protection: ProtFlags,
    ) -> Result<()> {
        let mapped = match self.release {
            Release::Unmap(mapped) => mapped,
            Release::Nothing | Release::Free(_) => 0,
        };
        let part_end = at.saturating_add(length);
        let beyond = MapError::BeyondRange { end: part_end, length_bytes: self.length };
        let pages = round_up(length).ok_or(beyond)?;
        let pages_end = at.checked_add(pages).ok_or(beyond)?;
        if part_end > self.length || pages_end > mapped {
            return Err(beyond);
        }
        let end = offset.saturating_add(length as u64);
        let size_bytes = file_size(file).map_err(|errno| refused(errno, length))?;
        if end > size_bytes {
            return Err(MapError::BeyondFile { end, size_bytes });
        }
        let target = self.base.as_ptr().wrapping_add(at).cast::<c_void>();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the pages replaced, `at..pages_end`, lie in the `mapped` pages that are this
        // block's own (checked above), and `&mut self` means that no reference into them exists.
        // The file holds the bytes (checked above) and keeps them (see the module).
        let placed = unsafe { mmap(target, pages, protection, flags, file, offset) };
        match placed {
            Ok(address) => {
                debug_assert_eq!(address, target, "MAP_FIXED maps where it was told to");
                Ok(())
            }
            Err(errno) => {
                let error = refused(errno, length);
                self.cut(at, pages_end, mapped);
                Err(error)
            }
        }
    }

    /// Ends the block at `at` after the kernel refused to replace `at..pages_end`: it may already
    /// have unmapped them, and someone else may have got them since, so they are let go for ever.
    fn cut(&mut self, at: usize, pages_end: usize, mapped: usize) {
        self.length = self.length.min(at);
        self.release = if at == 0 { Release::Nothing } else { Release::Unmap(at) };
        if pages_end < mapped {
            let rest = self.base.as_ptr().wrapping_add(pages_end).cast::<c_void>();
            // SAFETY: `pages_end..mapped` was this block's own and untouched by the refused call;
            // the block has just given it up. A refusal leaves unused addresses behind.
            let _ = unsafe { munmap(rest, mapped - pages_end) };
        }
    }

    /// Asks for huge pages; a system without them loses nothing.
    fn advise_huge_pages(&self) {
        if let Release::Unmap(mapped) = self.release {
            let base = self.base.as_ptr().cast::<c_void>();
            // SAFETY: the pages are this block's own, and the advice changes no content.
            let _ = unsafe { madvise(base, mapped, Advice::LinuxHugepage) };
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match self.release {
            Release::Nothing => {}
            Release::Unmap(mapped) => {
                let base = self.base.as_ptr().cast::<c_void>();
                // SAFETY: the pages are this block's own (see `Release::Unmap`), and whoever could
                // use their address held the block. A refusal (too many mappings while one that
                // the kernel has merged with a neighbour is split) leaves them unused.
                let _ = unsafe { munmap(base, mapped) };
            }
            Release::Free(layout) => {
                // SAFETY: `heap` got this base with this layout, and nothing else frees it.
                unsafe { dealloc(self.base.as_ptr(), layout) };
            }
        }
    }
}

fn file_size(file: BorrowedFd<'_>) -> std::result::Result<u64, Errno> {
    let status = rustix::fs::fstat(file)?;
    Ok(u64::try_from(status.st_size).unwrap_or(0))
}

/// Returns `length_bytes` if a slice can have that length.
fn range_length(length_bytes: u64) -> Result<usize> {
    isize::try_from(length_bytes)
        .map(isize::unsigned_abs)
        .map_err(|_| MapError::TooLong { length_bytes })
}

fn round_up(length: usize) -> Option<usize> {
    length.checked_next_multiple_of(page_bytes())
}

fn page_multiple(offset: u64) -> Result<()> {
    let page_bytes = page_bytes();
    if offset.is_multiple_of(page_bytes as u64) {
        Ok(())
    } else {
        Err(MapError::Unaligned { offset, page_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_range_keeps_what_lies_before_the_refused_part() {
        let page = page_bytes();
        let mut map = OwnedMap::reserve(8 * page, 0).unwrap();
        map.bytes_mut()[..2 * page].fill(7);
        map.block.cut(2 * page, 4 * page, 8 * page);
        assert_eq!(map.bytes(), vec![7; 2 * page]);
        // What the refused call may have left is the kernel's: give it back here, for the test.
        let left = map.block.base.as_ptr().wrapping_add(2 * page).cast::<c_void>();
        // SAFETY: `cut` let these two pages go, and this test knows that nobody else has them.
        unsafe { munmap(left, 2 * page) }.unwrap();
        map.block.cut(0, 2 * page, 2 * page);
        assert!(map.bytes().is_empty());
    }
}

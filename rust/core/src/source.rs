//! Where bytes come from and go to: memory that somebody else may own.

use crate::map::OwnedMap;

/// Readable memory that this crate copies from, block by block.
///
/// What is checksummed is the copy, so memory that changes meanwhile cannot make a checksum wrong.
pub trait Source: Sync {
    /// Returns the number of bytes.
    fn len(&self) -> usize;

    /// Returns whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` with the bytes that begin at `offset`.
    ///
    /// # Panics
    ///
    /// May panic if `offset + out.len()` exceeds `len()`; callers check sizes first.
    fn copy_to(&self, offset: usize, out: &mut [u8]);
}

impl Source for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[expect(clippy::indexing_slicing, reason = "the trait says so")]
    fn copy_to(&self, offset: usize, out: &mut [u8]) {
        out.copy_from_slice(&self[offset..offset + out.len()]);
    }
}

impl Source for Vec<u8> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn copy_to(&self, offset: usize, out: &mut [u8]) {
        self.as_slice().copy_to(offset, out);
    }
}

/// Writable memory that this crate copies to, row by row; what is in it before is never read.
pub trait Sink: Send {
    /// Returns the number of bytes.
    fn len(&self) -> usize;

    /// Returns whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces the bytes that begin at `offset` by `bytes`.
    ///
    /// # Panics
    ///
    /// May panic if `offset + bytes.len()` exceeds `len()`; callers check sizes first.
    fn copy_from(&mut self, offset: usize, bytes: &[u8]);
}

impl Sink for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[expect(clippy::indexing_slicing, reason = "the trait says so")]
    fn copy_from(&mut self, offset: usize, bytes: &[u8]) {
        self[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl Sink for Vec<u8> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) {
        self.as_mut_slice().copy_from(offset, bytes);
    }
}

impl Sink for OwnedMap {
    fn len(&self) -> usize {
        self.bytes().len()
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes_mut().copy_from(offset, bytes);
    }
}

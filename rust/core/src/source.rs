//! Where bytes come from and go to: memory that somebody else may own.

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

//! The extent of a tensor: sizes and strides in the units of both protocols.

use std::ptr;

use lamina_core::dtype::Dtype;

/// Sizes and strides of a tensor, at an address that does not move.
#[derive(Debug)]
pub(super) struct Extent {
    pub(super) shape: Box<[i64]>,
    /// In elements, as `DLPack` has them.
    pub(super) strides: Box<[i64]>,
    /// In bytes, as the buffer protocol has them.
    pub(super) byte_strides: Box<[isize]>,
    pub(super) bytes: usize,
}

impl Extent {
    /// Returns the extent of a C-contiguous tensor, or none if no memory can have it.
    pub(super) fn new(shape: &[usize], dtype: Dtype) -> Option<Self> {
        let size = isize::try_from(dtype.size()).ok()?;
        let sizes: Vec<i64> =
            shape.iter().map(|n| i64::try_from(*n).ok()).collect::<Option<_>>()?;
        let mut strides = vec![1_i64; sizes.len()];
        let mut elements = 1_i64;
        for (stride, length) in strides.iter_mut().zip(&sizes).rev() {
            *stride = elements;
            elements = elements.checked_mul((*length).max(1))?;
        }
        isize::try_from(elements).ok()?.checked_mul(size)?;
        let byte_strides = strides.iter().map(|n| isize::try_from(*n).ok()?.checked_mul(size));
        let bytes = if sizes.contains(&0) { 0 } else { isize::try_from(elements).ok()? * size };
        Some(Self {
            byte_strides: byte_strides.collect::<Option<_>>()?,
            shape: sizes.into(),
            strides: strides.into(),
            bytes: bytes.unsigned_abs(),
        })
    }

    /// Returns whether the order of the axes makes no difference in memory.
    pub(super) fn is_any_order(&self) -> bool {
        self.bytes == 0 || self.shape.iter().filter(|length| **length > 1).count() <= 1
    }
}

/// Returns the address of `values`, which C does not write to; null where there are none.
pub(super) fn address<T>(values: &[T]) -> *mut T {
    if values.is_empty() { ptr::null_mut() } else { values.as_ptr().cast_mut() }
}

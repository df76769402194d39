//! The structures of `DLPack` 1.0 (`dlpack.h`), and the two kinds of capsule that carry them.

use std::ffi::{CStr, c_void};
use std::ptr;

use super::delete;

/// `DLDevice` of memory that the processor reads, as `DLPack` and Python write it.
pub(super) const CPU: (i32, i32) = (1, 0);

/// The version exported: what every consumer of versioned capsules knows.
pub(super) const VERSION: (u32, u32) = (1, 0);

/// Set where the memory stands for what is stored; honoured by `NumPy`, ignored by `torch`.
pub(super) const READ_ONLY: u64 = 1 << 0;

/// Set where the consumer asked for memory of its own.
pub(super) const IS_COPIED: u64 = 1 << 1;

/// `DLDataType`.
#[repr(C)]
pub(super) struct DlDataType {
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
pub(super) struct DlTensor {
    pub(super) data: *mut c_void,
    pub(super) device_type: i32,
    pub(super) device_id: i32,
    pub(super) ndim: i32,
    pub(super) dtype: DlDataType,
    pub(super) shape: *mut i64,
    pub(super) strides: *mut i64,
    pub(super) byte_offset: u64,
}

/// `DLManagedTensor`, which a capsule named `dltensor` holds.
#[repr(C)]
pub(super) struct Legacy {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: unsafe extern "C" fn(*mut Self),
}

/// `DLManagedTensorVersioned`, which a capsule named `dltensor_versioned` holds.
#[repr(C)]
pub(super) struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: unsafe extern "C" fn(*mut Self),
    flags: u64,
    tensor: DlTensor,
}

/// What a capsule holds, and what it is called until a consumer has taken it over.
pub(super) trait Managed: Sized + 'static {
    const NAME: &'static CStr;

    fn new(tensor: DlTensor, flags: u64) -> Self;
}

impl Managed for Legacy {
    const NAME: &'static CStr = c"dltensor";

    fn new(tensor: DlTensor, _flags: u64) -> Self {
        Self { tensor, context: ptr::null_mut(), deleter: delete::<Self> }
    }
}

impl Managed for Versioned {
    const NAME: &'static CStr = c"dltensor_versioned";

    fn new(tensor: DlTensor, flags: u64) -> Self {
        let (major, minor) = VERSION;
        Self { major, minor, context: ptr::null_mut(), deleter: delete::<Self>, flags, tensor }
    }
}

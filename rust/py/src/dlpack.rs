//! Memory in and out of Python: `DLPack` capsules, the buffer protocol, and the tensor behind both.
//!
//! This file promises that
//!
//! - memory lives as long as anything that Python, `torch` or another library made from it: each
//!   export holds its own reference, and none is lost or dropped twice;
//! - dropping an export needs neither the interpreter nor a certain thread;
//! - memory that belongs to Python is only ever copied from or to, through its address: nothing
//!   here is wrong if Python writes to it meanwhile, except the values copied.
#![expect(unsafe_code, reason = "C interfaces; one operation a block, each with its invariant")]

mod extent;
mod layout;

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use lamina_core::dtype::Dtype;
use lamina_core::map::{OwnedMap, SharedMap};
use lamina_core::source::{Sink, Source};
use pyo3::buffer::{Element, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyMemoryView, PyTuple};

use self::extent::{Extent, address};
use self::layout::{CPU, DlDataType, DlTensor, IS_COPIED, Legacy, Managed, READ_ONLY, Versioned};
use crate::errors::{raise, run};

/// What an export owns. `managed` comes first: its address is that of the whole.
#[repr(C)]
struct Export<M> {
    managed: M,
    _memory: Arc<SharedMap>,
    _extent: Arc<Extent>,
}

/// Frees an export. Consumers call it once, on any thread, even after the interpreter is gone.
unsafe extern "C" fn delete<M: Managed>(managed: *mut M) {
    if managed.is_null() {
        return;
    }
    // SAFETY: `capsule` made `managed` from a `Box<Export<M>>` whose first field it is (`repr(C)`),
    // and `DLPack` has its one owner, the consumer or else the capsule, call this once.
    drop(unsafe { Box::from_raw(managed.cast::<Export<M>>()) });
}

/// Frees the export of a capsule that nobody took over.
unsafe extern "C" fn drop_capsule<M: Managed>(capsule: *mut ffi::PyObject) {
    let name = M::NAME.as_ptr();
    // SAFETY: Python calls this with a live capsule; a consumer that took it over renamed it.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name) } == 0 {
        return;
    }
    // SAFETY: the capsule is valid under this name, as was just asked, and cannot change here.
    let managed = unsafe { ffi::PyCapsule_GetPointer(capsule, name) };
    // SAFETY: the pointer is the one `capsule` put there, and nobody took it over.
    unsafe { delete::<M>(managed.cast()) };
}

/// Memory with a dtype and a shape, in C order, for other libraries to take over without a copy.
///
/// `torch.from_dlpack`, `numpy.from_dlpack`, `memoryview` and whatever else knows `DLPack` or the
/// buffer protocol share the memory and keep it alive. Writing to what stands for stored values
/// changes them for this process's views of that memory only, never the file.
#[pyclass(frozen, module = "lamina._core")]
pub(crate) struct Tensor {
    memory: Arc<SharedMap>,
    offset: usize,
    dtype: Dtype,
    extent: Arc<Extent>,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tensor({}, {:?})", self.dtype, self.extent.shape)
    }
}

impl Tensor {
    /// Returns a C-contiguous tensor over `memory` from `offset` bytes on.
    ///
    /// Fails with `ValueError` where the memory does not reach that far.
    pub(crate) fn new(
        memory: Arc<SharedMap>,
        offset: usize,
        dtype: Dtype,
        shape: &[usize],
    ) -> PyResult<Self> {
        let fits = Extent::new(shape, dtype).filter(|extent| {
            offset.checked_add(extent.bytes).is_some_and(|end| end <= memory.len())
        });
        let Some(extent) = fits else {
            return Err(PyValueError::new_err(format!(
                "{dtype} of shape {shape:?} does not fit in {} bytes from byte {offset} on",
                memory.len()
            )));
        };
        Ok(Self { memory, offset, dtype, extent: Arc::new(extent) })
    }

    /// Returns a tensor that owns all of `memory` by itself.
    pub(crate) fn owning(memory: OwnedMap, dtype: Dtype, shape: &[usize]) -> PyResult<Self> {
        Self::new(Arc::new(memory.share()), 0, dtype, shape)
    }

    /// Returns the address of the first element; what it may be used for lives as long as `memory`.
    fn data(&self) -> *mut c_void {
        self.memory.as_ptr().wrapping_add(self.offset).cast()
    }

    /// Returns a copy in memory of its own.
    fn copied(&self) -> lamina_core::Result<Self> {
        let mut copy = OwnedMap::anonymous(self.extent.bytes)?;
        self.memory.copy_to(self.offset, copy.bytes_mut())?;
        let (memory, extent) = (Arc::new(copy.share()), Arc::clone(&self.extent));
        Ok(Self { memory, offset: 0, dtype: self.dtype, extent })
    }

    /// Returns a capsule that owns a reference to the memory until a consumer takes it over.
    fn capsule<'py, M: Managed>(
        &self,
        py: Python<'py>,
        flags: u64,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let (code, bits) = self.dtype.dlpack();
        let (device_type, device_id) = CPU;
        let tensor = DlTensor {
            data: if self.extent.bytes == 0 { ptr::null_mut() } else { self.data() },
            device_type,
            device_id,
            ndim: i32::try_from(self.extent.shape.len())?,
            dtype: DlDataType { code, bits, lanes: 1 },
            shape: address(&self.extent.shape),
            strides: address(&self.extent.strides),
            byte_offset: 0,
        };
        let export = NonNull::from(Box::leak(Box::new(Export {
            managed: M::new(tensor, flags),
            _memory: Arc::clone(&self.memory),
            _extent: Arc::clone(&self.extent),
        })));
        let destructor = Some(drop_capsule::<M> as ffi::PyCapsule_Destructor);
        // SAFETY: `export` lives until `delete`, called by the consumer that takes it over or else
        // by `drop_capsule`, which works on any thread.
        let capsule = unsafe {
            PyCapsule::new_with_pointer_and_destructor(py, export.cast(), M::NAME, destructor)
        };
        if capsule.is_err() {
            // SAFETY: no capsule came to own the export just made.
            unsafe { delete::<M>(export.as_ptr().cast()) };
        }
        capsule
    }

    /// Returns the error for what `NumPy` and the buffer protocol have no format for.
    fn no_format(&self, py: Python<'_>) -> PyErr {
        let dtype = self.dtype;
        let message = format!(
            "NumPy has no {dtype}: take `.tensor` (a torch tensor), or install `ml_dtypes` and \
             view the bytes as `ml_dtypes.{dtype}`"
        );
        raise(py, "DtypeError", message)
    }
}

#[pymethods]
impl Tensor {
    /// The dtype, as torch names it: `bfloat16`, `float8_e4m3fn`, `uint8`.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// The length of each axis.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.extent.shape)
    }

    /// The length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.extent.bytes
    }

    /// Return the rows from `start` to before `stop`, in the same memory.
    fn rows(&self, py: Python<'_>, start: i64, stop: i64) -> PyResult<Self> {
        let Some((rows, feature)) = self.extent.shape.split_first() else {
            return Err(PyTypeError::new_err("a tensor without axes has no rows"));
        };
        if start < 0 || start > stop || stop > *rows {
            let message = format!("rows {start} to {stop} are out of range: there are {rows} rows");
            return Err(raise(py, "PositionError", message));
        }
        let shape: Result<Vec<usize>, _> = std::iter::once(stop - start)
            .chain(feature.iter().copied())
            .map(usize::try_from)
            .collect();
        let before = self.extent.byte_strides.first().map_or(0, |stride| stride.unsigned_abs());
        // A tensor without bytes may have rows whose product with a stride lies beyond its memory.
        let skipped = if self.extent.bytes == 0 { 0 } else { usize::try_from(start)? * before };
        Self::new(Arc::clone(&self.memory), self.offset + skipped, self.dtype, &shape?)
    }

    /// Return the same memory as `uint8` of shape `[nbytes]`.
    fn bytes(&self) -> PyResult<Self> {
        Self::new(Arc::clone(&self.memory), self.offset, Dtype::U8, &[self.extent.bytes])
    }

    fn __len__(&self) -> PyResult<usize> {
        match self.extent.shape.first() {
            Some(rows) => Ok(usize::try_from(*rows)?),
            None => Err(PyTypeError::new_err("a tensor without axes has no length")),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Tensor(shape={}, dtype={})", self.shape(py)?.repr()?, self.dtype))
    }

    /// Return a `DLPack` capsule: versioned where `max_version` is 1.0 or more, else the legacy one.
    ///
    /// The memory is shared, marked read-only where it stands for stored values, unless `copy` is
    /// true: then it is a copy, aligned to 64 bytes, that belongs to the caller.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(i64, i64)>,
        dl_device: Option<(i64, i64)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        if let Some(stream) = stream {
            let message =
                format!("memory of the CPU has no streams: expected None, found {stream}");
            return Err(PyBufferError::new_err(message));
        }
        if let Some(device) = dl_device.filter(|device| *device != (CPU.0.into(), CPU.1.into())) {
            let message =
                format!("memory of the CPU, {CPU:?}, is not exported to device {device:?}");
            return Err(PyBufferError::new_err(message));
        }
        let copied = match copy {
            Some(true) => Some(run(py, || self.copied())?),
            Some(false) | None => None,
        };
        let flags = match copied {
            Some(_) => IS_COPIED,
            None if self.memory.is_column() => READ_ONLY,
            None => 0,
        };
        let exported = copied.as_ref().unwrap_or(self);
        if max_version.is_some_and(|version| version >= (1, 0)) {
            exported.capsule::<Versioned>(py, flags)
        } else {
            exported.capsule::<Legacy>(py, flags)
        }
    }

    /// Return the type and the number of the device for `DLPack`: the CPU, `(1, 0)`.
    #[expect(clippy::unused_self, reason = "the protocol calls it on the object")]
    fn __dlpack_device__(&self) -> (i32, i32) {
        CPU
    }

    /// Return a `numpy` array in the same memory, or raise `DtypeError` where it has no such dtype.
    #[pyo3(signature = (dtype=None, *, copy=None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let this = slf.get();
        if this.dtype.buffer_format().is_none() {
            return Err(this.no_format(py));
        }
        let options = PyDict::new(py);
        options.set_item("copy", copy)?;
        let arguments = (PyMemoryView::from(slf)?, dtype);
        py.import("numpy")?.call_method("array", arguments, Some(&options))
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let Some(view) = NonNull::new(view) else {
            return Err(PyBufferError::new_err("no view to fill in"));
        };
        let filled = slf.get().view(slf.py(), flags);
        let (buffer, result) = match filled {
            Ok(buffer) => (ffi::Py_buffer { obj: slf.into_ptr(), ..buffer }, Ok(())),
            Err(error) => (ffi::Py_buffer::new(), Err(error)), // without an owner: nothing to release
        };
        // SAFETY: Python calls this with room for one view.
        unsafe { view.write(buffer) };
        result
    }
}

impl Tensor {
    /// Returns what the buffer protocol is told, the owner apart. The pointers are to memory and
    /// extent, which the owner, a frozen object, keeps.
    fn view(&self, py: Python<'_>, flags: c_int) -> PyResult<ffi::Py_buffer> {
        let Some(format) = self.dtype.buffer_format() else {
            return Err(self.no_format(py));
        };
        let asks = |flag: c_int| flags & flag == flag;
        let is_readonly = self.memory.is_column();
        if asks(ffi::PyBUF_WRITABLE) && is_readonly {
            return Err(PyBufferError::new_err("stored values are read-only: copy them to write"));
        }
        if asks(ffi::PyBUF_F_CONTIGUOUS) && !self.extent.is_any_order() {
            return Err(PyBufferError::new_err("the memory is in C order, not in Fortran order"));
        }
        let mut view = ffi::Py_buffer {
            buf: self.data(),
            len: self.extent.bytes.try_into()?,
            itemsize: self.dtype.size().try_into()?,
            readonly: is_readonly.into(),
            ndim: self.extent.shape.len().try_into()?,
            ..ffi::Py_buffer::new()
        };
        if asks(ffi::PyBUF_FORMAT) {
            view.format = format.as_ptr().cast_mut();
        }
        if asks(ffi::PyBUF_ND) {
            view.shape = address(&self.extent.shape).cast();
        }
        if asks(ffi::PyBUF_STRIDES) {
            view.strides = address(&self.extent.byte_strides);
        }
        Ok(view)
    }
}

const _: () = assert!(size_of::<isize>() == size_of::<i64>(), "`view` shares shapes");

/// Memory of a Python object to read from: C-contiguous, kept alive, of whatever item type.
///
/// It may be used and dropped on any thread, without the GIL.
pub(crate) struct InputBuffer(PyUntypedBuffer);

/// Memory of a Python object to write to: C-contiguous, writable, kept alive.
///
/// It may be used and dropped on any thread, without the GIL.
pub(crate) struct OutputBuffer(PyUntypedBuffer);

fn contiguous(object: &Bound<'_, PyAny>) -> PyResult<PyUntypedBuffer> {
    let buffer = PyUntypedBuffer::get(object)?;
    if buffer.is_c_contiguous() {
        return Ok(buffer);
    }
    let (shape, strides) = (buffer.shape(), buffer.strides());
    let message = format!(
        "expected memory in C order without gaps, found shape {shape:?} with strides {strides:?}"
    );
    Err(raise(object.py(), "InputError", message))
}

impl<'py> FromPyObject<'_, 'py> for InputBuffer {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        contiguous(&object).map(Self)
    }
}

impl<'py> FromPyObject<'_, 'py> for OutputBuffer {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let buffer = contiguous(&object)?;
        if buffer.readonly() {
            let message = String::from("expected memory to write to, found read-only memory");
            return Err(raise(object.py(), "InputError", message));
        }
        Ok(Self(buffer))
    }
}

impl InputBuffer {
    /// Returns a copy of the items; `BufferError` where they are not of type `T`.
    pub(crate) fn items<T: Element>(&self, py: Python<'_>) -> PyResult<Vec<T>> {
        self.0.as_typed::<T>()?.to_vec(py)
    }
}

impl Source for InputBuffer {
    fn len(&self) -> usize {
        self.0.len_bytes()
    }

    fn copy_to(&self, offset: usize, out: &mut [u8]) {
        let end = offset.saturating_add(out.len());
        assert!(end <= self.len(), "byte {end} of {} to read", self.len());
        let from = self.0.buf_ptr().cast::<u8>().wrapping_add(offset);
        // SAFETY: the view that `self` holds keeps `len_bytes` readable, contiguous bytes
        // (`contiguous`), and the part lies inside them (just checked). `out` is exclusive Rust
        // memory, so it is no part of them; no reference to Python's memory is made.
        unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
    }
}

impl Sink for OutputBuffer {
    fn len(&self) -> usize {
        self.0.len_bytes()
    }

    fn copy_from(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.saturating_add(bytes.len());
        assert!(end <= self.len(), "byte {end} of {} to write", self.len());
        let to = self.0.buf_ptr().cast::<u8>().wrapping_add(offset);
        // SAFETY: as in `copy_to`; the view is writable (`extract`). `bytes` is a Rust slice, which
        // is never memory that Python has (`SharedMap` gives none).
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

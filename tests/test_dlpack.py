"""The memory of a store in other libraries: DLPack and the buffer protocol, out and in."""

import ctypes
import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.memory import SITE, pattern, row_bytes, writable_mappings, write_store

from lamina import _core
from lamina.errors import DtypeError, InputError, PositionError

FORMATS = {
    "float32": "f",
    "float16": "e",
    "float64": "d",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "bool": "?",
}
WITHOUT_NUMPY = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]
ROWS = 300


def column(directory: Path, dtype: str = "float32", shape: tuple[int, ...] = (3, 4)) -> Any:
    values = pattern(dtype, shape, ROWS)
    return write_store(directory, {SITE: (dtype, shape, values)}).column(0)


def gathered(directory: Path, dtype: str = "float32", shape: tuple[int, ...] = (3, 4)) -> Any:
    values = pattern(dtype, shape, ROWS)
    store = write_store(directory, {SITE: (dtype, shape, values)})
    return store.read(0, 10, 30)


class Managed(ctypes.Structure):
    """What a capsule holds; versioned ones have `head` and `flags` too."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Head(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    ]


def opened(capsule: object) -> tuple[Head | None, Managed]:
    """Read a capsule without taking it over."""
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, name(capsule))
    if name(capsule) == b"dltensor":
        return None, Managed.from_address(address)
    assert name(capsule) == b"dltensor_versioned"
    return Head.from_address(address), Managed.from_address(address + ctypes.sizeof(Head))


@pytest.mark.parametrize("dtype", [*FORMATS, *WITHOUT_NUMPY])
def test_every_dtype_reaches_torch_as_itself(tmp_path, dtype):
    values = pattern(dtype, (3, 4), ROWS)
    store = write_store(tmp_path / "store", {SITE: (dtype, (3, 4), values)})
    for exported in (store.column(0), store.read(0, 0, ROWS)):
        assert exported.dtype == dtype
        assert exported.nbytes == values.nbytes
        tensor = torch.from_dlpack(exported)
        assert tensor.dtype is getattr(torch, dtype)
        assert tensor.shape == exported.shape == (ROWS, 3, 4)
        assert tensor.view(torch.uint8).numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", FORMATS)
def test_numpy_and_memoryview_share_what_they_have_a_format_for(tmp_path, dtype):
    exported = column(tmp_path / "store", dtype)
    view = memoryview(exported)
    assert (view.format, view.shape, view.readonly) == (FORMATS[dtype], (ROWS, 3, 4), True)
    assert view.c_contiguous
    arrays = [np.asarray(exported), np.from_dlpack(exported), exported.__array__()]
    address = torch.from_dlpack(exported).data_ptr()
    for array in arrays:
        assert array.dtype == np.dtype(dtype)
        assert array.ctypes.data == address
        assert array.tobytes() == pattern(dtype, (3, 4), ROWS).tobytes()
    assert np.asarray(exported, dtype=np.float64).dtype == np.float64
    assert np.array(exported, copy=True).ctypes.data != address


@pytest.mark.parametrize("dtype", WITHOUT_NUMPY)
def test_what_numpy_lacks_is_an_error_that_says_what_to_do(tmp_path, dtype):
    import ml_dtypes

    exported = column(tmp_path / "store", dtype)
    message = rf"NumPy has no {dtype}: take `\.tensor` .* view the bytes as `ml_dtypes\.{dtype}`"
    for ask in (np.asarray, memoryview, lambda tensor: tensor.__array__()):
        with pytest.raises(DtypeError, match=message):
            ask(exported)
    array = np.asarray(exported.bytes()).view(getattr(ml_dtypes, dtype)).reshape(exported.shape)
    expected = torch.from_dlpack(exported).float().numpy()
    np.testing.assert_array_equal(array.astype(np.float32), expected)


def test_stored_values_are_read_only_where_a_library_knows_that(tmp_path):
    exported = column(tmp_path / "store")
    for array in (np.from_dlpack(exported), np.asarray(exported)):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        memoryview(exported.bytes())[0] = 1


def test_copies_belong_to_the_caller(tmp_path):
    exported = gathered(tmp_path / "store")
    array = np.asarray(exported)
    array[0] = 7
    np.from_dlpack(exported)[1] = 8
    memoryview(exported.bytes())[96] = 9
    capsule = exported.__dlpack__(max_version=(1, 0))
    head, _ = opened(capsule)
    assert head is not None
    assert head.flags == 0
    assert torch.from_dlpack(exported)[:2].unique().tolist() == [7.0, 8.0]
    assert np.asarray(exported.bytes())[96] == 9


@pytest.mark.parametrize(
    ("max_version", "versioned"),
    [(None, False), ((0, 8), False), ((1, 0), True), ((1, 3), True), ((2, 0), True)],
)
def test_a_capsule_is_of_the_kind_that_was_asked_for(tmp_path, max_version, versioned):
    exported = column(tmp_path / "store", "bfloat16")
    capsule = exported.__dlpack__(max_version=max_version)
    head, managed = opened(capsule)
    assert (head is not None) == versioned
    if head is not None:
        assert list(head.version) == [1, 0]
        assert head.flags == 1  # read-only
    assert list(managed.device) == [1, 0]
    assert (managed.code, managed.bits, managed.lanes) == (4, 16, 1)
    assert managed.shape[: managed.ndim] == [ROWS, 3, 4]
    assert managed.strides[: managed.ndim] == [12, 4, 1]
    assert managed.byte_offset == 0
    assert managed.data == torch.from_dlpack(exported).data_ptr()
    assert torch.utils.dlpack.from_dlpack(capsule).shape == (ROWS, 3, 4)


def test_numpy_takes_a_legacy_capsule(tmp_path):
    class Legacy:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **_):
            return self.tensor.__dlpack__()

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    exported = column(tmp_path / "store")
    np.testing.assert_array_equal(np.from_dlpack(Legacy(exported)), np.asarray(exported))


def test_a_copy_asked_for_is_a_copy(tmp_path):
    exported = column(tmp_path / "store").rows(1, 200)
    before = torch.from_dlpack(exported).clone()
    for version, offset in (((1, 0), True), (None, False)):
        capsule = exported.__dlpack__(copy=True, max_version=version)
        head, managed = opened(capsule)
        if offset:
            assert head is not None
            assert head.flags == 2  # copied, writable
        assert managed.data % 64 == 0
        copy = torch.utils.dlpack.from_dlpack(capsule)
        assert torch.equal(copy, before)
        copy.zero_()
        assert torch.equal(torch.from_dlpack(exported), before)
    array = np.from_dlpack(exported, copy=True)
    array[:] = 5
    assert torch.equal(torch.from_dlpack(exported, copy=True), before)
    for shared in (torch.from_dlpack(exported, copy=False), torch.from_dlpack(exported)):
        assert shared.data_ptr() == torch.from_dlpack(exported).data_ptr()


def test_only_the_cpu_and_no_stream_is_served(tmp_path):
    exported = column(tmp_path / "store")
    assert exported.__dlpack_device__() == (1, 0)
    assert torch.from_dlpack(exported, device="cpu").device.type == "cpu"
    exported.__dlpack__(dl_device=(1, 0))
    for device in ((2, 0), (1, 1), (-3, 7)):
        message = rf"memory of the CPU, \(1, 0\), is not exported to device \({device[0]}, "
        with pytest.raises(BufferError, match=message):
            exported.__dlpack__(dl_device=device)
        with pytest.raises(BufferError, match=message):
            exported.__dlpack__(dl_device=device, copy=True)
    with pytest.raises(BufferError, match="no streams: expected None, found 1"):
        exported.__dlpack__(stream=1)


def test_no_rows_are_exported_as_no_rows(tmp_path):
    exported = column(tmp_path / "store").rows(7, 7)
    capsule = exported.__dlpack__()
    _, managed = opened(capsule)
    assert managed.data is None
    assert len(exported) == exported.nbytes == 0
    assert torch.from_dlpack(exported).shape == (0, 3, 4)
    assert torch.from_dlpack(exported, copy=True).shape == (0, 3, 4)
    for array in (np.asarray(exported), np.from_dlpack(exported)):
        assert array.shape == (0, 3, 4)
    assert bytes(exported.bytes()) == b""


def test_one_number_per_row_is_a_column_with_one_axis(tmp_path):
    exported = column(tmp_path / "store", "int64", ())
    expected = pattern("int64", (), ROWS).view(np.int64)[:, 0]
    assert exported.shape == (ROWS,)
    assert torch.from_dlpack(exported).tolist() == expected.tolist()
    assert np.asarray(exported.rows(5, 9)).tolist() == expected[5:9].tolist()


def test_rows_are_views_inside_the_tensor(tmp_path):
    exported = column(tmp_path / "store", "float16", (5,))
    whole = torch.from_dlpack(exported)
    part = torch.from_dlpack(exported.rows(3, 8))
    assert part.data_ptr() == whole[3].data_ptr()
    assert torch.equal(part, whole[3:8])
    assert torch.equal(torch.from_dlpack(exported.rows(3, 8).rows(1, 2)), whole[4:5])
    for start, stop in ((-1, 2), (3, 2), (0, ROWS + 1), (ROWS + 1, ROWS + 1)):
        with pytest.raises(PositionError, match=f"rows {start} to {stop} are out of range"):
            exported.rows(start, stop)


def test_bytes_are_the_same_memory(tmp_path):
    exported = column(tmp_path / "store", "float8_e5m2", (7,))
    raw = exported.bytes()
    assert (raw.dtype, raw.shape) == ("uint8", (ROWS * 7,))
    assert np.asarray(raw).ctypes.data == torch.from_dlpack(exported).data_ptr()
    assert bytes(raw) == pattern("float8_e5m2", (7,), ROWS).tobytes()


def test_a_buffer_is_given_as_it_was_asked_for(tmp_path):
    exported = column(tmp_path / "store")
    values = pattern("float32", (3, 4), ROWS)
    assert np.frombuffer(exported, np.uint8).tobytes() == values.tobytes()  # no shape asked for
    assert bytes(memoryview(exported).cast("B")) == values.tobytes()
    with pytest.raises(TypeError, match="read-write bytes-like object"):
        io.BytesIO(b"abcd").readinto(exported)
    own = gathered(tmp_path / "other")
    io.BytesIO(b"abcd").readinto(own)
    assert bytes(own.bytes())[:4] == b"abcd"


def test_a_tensor_says_what_it_is_and_stays_that(tmp_path):
    exported = column(tmp_path / "store", "bfloat16", (8,))
    assert repr(exported) == f"Tensor(shape=({ROWS}, 8), dtype=bfloat16)"
    assert len(exported) == ROWS
    with pytest.raises(AttributeError):
        exported.dtype = "float32"
    with pytest.raises(TypeError):
        _core.Tensor()


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_that_nobody_takes_over_frees_its_memory(tmp_path, version):
    exported = column(tmp_path / "store")
    mapped = writable_mappings(tmp_path)
    assert mapped
    capsule = exported.__dlpack__(max_version=version)
    del exported
    gc.collect()
    assert writable_mappings(tmp_path) == mapped
    del capsule
    gc.collect()
    assert writable_mappings(tmp_path) == 0


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_is_taken_over_once(tmp_path, version):
    capsule = column(tmp_path / "store").__dlpack__(max_version=version)
    tensor = torch.utils.dlpack.from_dlpack(capsule)
    del capsule
    gc.collect()
    assert writable_mappings(tmp_path)
    assert tensor.numpy().tobytes() == pattern("float32", (3, 4), ROWS).tobytes()
    del tensor
    gc.collect()
    assert writable_mappings(tmp_path) == 0


def test_rows_are_gathered_into_memory_of_the_caller(tmp_path):
    values = pattern("float32", (3, 4), ROWS)
    store = write_store(tmp_path / "store", {SITE: ("float32", (3, 4), values)})
    rows = np.array([5, 0, 299, 5], dtype=np.int64)
    out = np.full(4 * row_bytes("float32", (3, 4)), 255, dtype=np.uint8)
    store.gather([0], rows, [out])
    assert out.tobytes() == values[rows].tobytes()


def test_memory_that_cannot_be_written_or_has_gaps_is_refused(tmp_path):
    values = pattern("float32", (4,), ROWS)
    store = write_store(tmp_path / "store", {SITE: ("float32", (4,), values)})
    rows = np.arange(3, dtype=np.int64)
    fixed = np.zeros(48, dtype=np.uint8)
    fixed.flags.writeable = False
    with pytest.raises(InputError, match="expected memory to write to, found read-only memory"):
        store.gather([0], rows, [fixed])
    gaps = np.zeros(96, dtype=np.uint8)[::2]
    message = r"in C order without gaps, found shape \[48\] with strides \[2\]"
    with pytest.raises(InputError, match=message):
        store.gather([0], rows, [gaps])
    with pytest.raises(InputError, match="in C order without gaps"):
        store.gather([0], np.arange(6, dtype=np.int64)[::2])
    with pytest.raises(TypeError, match="bytes-like"):
        store.gather([0], rows, [3])

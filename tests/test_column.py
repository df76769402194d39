"""Columns: views of the files, copies of rows, and what NumPy cannot have."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from tests.stores import LENGTHS, SITES, WIDTH, make, numbers

import lamina as lm

SITE = SITES[1]


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "acts")


@pytest.fixture
def expected():
    return torch.from_numpy(numbers()[1])


def test_a_column_has_shape_dtype_size_and_length(store):
    column = store[SITE]
    assert column.shape == (8, WIDTH)
    assert column.dtype == "float32"
    assert column.nbytes == 8 * WIDTH * 4
    assert len(column) == 8
    assert column.ndim == 2
    assert (column.path, column.site, column.position) == (SITE, SITE, None)
    assert column.lengths.tolist() == LENGTHS
    assert column.rows.tolist() == list(range(8))


def test_the_tensor_is_all_rows_and_shares_memory_with_slices(store, expected):
    column = store[SITE]
    assert torch.equal(column.tensor, expected)
    assert column.tensor.data_ptr() == column.tensor.data_ptr() == column[0:3].data_ptr()
    assert column[2].data_ptr() == column.tensor[2].data_ptr()
    assert column[np.int64(2)].data_ptr() == column[2].data_ptr()


def test_two_columns_of_one_site_share_nothing(store):
    assert store[SITE].tensor.data_ptr() != store[SITE].tensor.data_ptr()


def test_writing_in_place_reaches_other_views_of_the_column_and_nothing_else(store, expected):
    column = store[SITE]
    column.tensor.fill_(-1)
    assert (column[3:5] == -1).all()
    assert torch.equal(column[[0, 1, 2]], expected[:3])
    assert torch.equal(store[SITE].tensor, expected)
    assert torch.equal(lm.open(store.directory)[SITE].tensor, expected)
    assert torch.equal(store.gather(SITE, [4])[0, 0], expected[4])


def test_a_tensor_outlives_store_and_column(tmp_path, expected):
    tensor = make(tmp_path / "short-lived")[SITE].tensor
    gc.collect()
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    "key",
    [
        [3, 1, 7],
        [-1, 0],
        (),
        ...,
        5,
        -2,
        slice(2, 6),
        slice(None, None, 3),
        slice(-3, None),
        np.array([1, 1, 2]),
        np.array([[0, 1], [2, 3]], dtype=np.int16),
        torch.tensor([6, 0]),
        torch.tensor([True, False] * 4),
        np.array([False, True] * 4),
        [True] * 8,
        range(2, 5),
        (slice(1, 3), slice(0, 2)),
        (2, 4),
        ([5, 2], slice(None, 3)),
        (Ellipsis, 1),
    ],
    ids=repr,
)
def test_indexing_is_that_of_torch(store, expected, key):
    wanted = expected[list(key) if isinstance(key, range) else key]
    assert torch.equal(store[SITE][key], wanted)


def test_an_empty_list_selects_no_rows(store):
    assert store[SITE][[]].shape == (0, WIDTH)


def test_a_slice_backwards_copies_the_rows_in_that_order(store, expected):
    assert torch.equal(store[SITE][::-1], expected.flip(0))


@pytest.mark.parametrize("key", [[0, 1], np.array([3]), [True] * 8, torch.tensor([2, 2])])
def test_lists_arrays_and_masks_copy(store, key):
    column = store[SITE]
    picked = column[key]
    picked.fill_(-7)
    assert not (column.tensor == -7).any()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (8, r"8 lies outside model\.layers\[1\]\.output \(0 to 7\)"),
        ([0, -9, 12], r"-9 and 12 lie outside"),
    ],
)
def test_a_row_outside_is_a_position_error_that_names_it(store, key, message):
    with pytest.raises(lm.PositionError, match=message):
        store[SITE][key]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ([True, False], r"a mask over .* must have shape \[8\], not \[2\]"),
        ([0.5], "not by float64 values"),
        ("a", "not by <U1 values"),
        (None, "not by NoneType"),
        (True, "not by bool values"),
        ([[1], [2, 3]], "not by list"),
    ],
)
def test_a_key_that_selects_no_rows_is_refused(store, key, message):
    with pytest.raises(lm.InputError, match=message):
        store[SITE][key]


def test_numpy_shares_memory_and_converts_on_request(store, expected):
    column = store[SITE]
    array = column.numpy()
    assert np.array_equal(array, expected.numpy())
    assert array.ctypes.data == column.tensor.data_ptr()
    assert np.asarray(column).ctypes.data == array.ctypes.data
    assert np.array(column).ctypes.data != array.ctypes.data
    assert np.asarray(column, dtype=np.float64).dtype == np.float64
    assert column.numpy(np.float16).dtype == np.float16
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(column, dtype=np.float64, copy=False)


def test_dlpack_gives_torch_and_numpy_the_same_memory(store, expected):
    column = store[SITE]
    assert torch.from_dlpack(column).data_ptr() == column.tensor.data_ptr()
    assert np.array_equal(np.from_dlpack(column), expected.numpy())
    assert column.__dlpack_device__() == (1, 0)
    at_end = store[f"{SITE}[-1]"]
    assert torch.equal(torch.from_dlpack(at_end), at_end.tensor)


DTYPES = [
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (5, 16), dtype=torch.uint8)
    values = raw.view(getattr(torch, dtype))
    with lm.create(tmp_path / "acts", sites={SITE: (values.shape[1], dtype)}) as writer:
        writer.append({SITE: values}, tokens=range(5))
    column = lm.open(tmp_path / "acts")[SITE]
    assert column.dtype == dtype
    assert column.tensor.dtype == values.dtype
    assert torch.equal(column.tensor.view(torch.uint8), raw)
    assert torch.equal(column[[4, 0]].view(torch.uint8), raw[[4, 0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_that_numpy_lacks_are_refused_with_both_ways_out(tmp_path, dtype):
    import ml_dtypes

    values = torch.arange(8).reshape(4, 2).to(getattr(torch, dtype))
    with lm.create(tmp_path / "acts", sites={SITE: (2, dtype)}) as writer:
        writer.append({SITE: values}, tokens=range(4))
    column = lm.open(tmp_path / "acts")[SITE]
    message = rf"{dtype}, which NumPy does not have: use `\.tensor`.*\.numpy\(ml_dtypes\.{dtype}\)"
    for ask in (column.numpy, lambda: np.asarray(column)):
        with pytest.raises(lm.DtypeError, match=message):
            ask()
    array = column.numpy(getattr(ml_dtypes, dtype))
    assert array.astype(np.float32).tolist() == values.float().tolist()
    assert array.ctypes.data == column.tensor.data_ptr()


def test_bfloat16_converts_to_the_floats_that_numpy_has(tmp_path):
    values = torch.randn(4, 2).bfloat16()
    with lm.create(tmp_path / "acts", sites={SITE: (2, "bf16")}) as writer:
        writer.append({SITE: values}, tokens=range(4))
    column = lm.open(tmp_path / "acts")[SITE]
    assert column.numpy(np.float32).tolist() == values.float().tolist()
    with pytest.raises(lm.DtypeError, match="cannot make int32 of bfloat16"):
        column.numpy(np.int32)


def test_a_feature_shape_may_be_empty_or_have_several_axes(tmp_path):
    sites = {"model.a.output": ((), "float32"), "model.b.output": ((2, 3), "int16")}
    flat, deep = torch.arange(5.0), torch.arange(30, dtype=torch.int16).reshape(5, 2, 3)
    with lm.create(tmp_path / "acts", sites=sites) as writer:
        writer.append({"model.a.output": flat, "model.b.output": deep}, tokens=range(5))
    store = lm.open(tmp_path / "acts")
    assert torch.equal(store["model.a.output"].tensor, flat)
    assert torch.equal(store["model.a.output[-1]"].tensor, flat[-1:])
    assert torch.equal(store["model.b.output"][[3, 1]], deep[[3, 1]])
    assert torch.equal(store["model.b.output"].tensor, deep)


def test_a_column_at_a_position_copies_each_time(store, expected):
    column = store[f"{SITE}[-1]"]
    assert column.shape == (3, WIDTH)
    assert column.tier is None
    assert torch.equal(column.tensor, expected[[2, 3, 7]])
    assert column.tensor.data_ptr() != column.tensor.data_ptr()
    assert torch.equal(column[1:], expected[[3, 7]])
    assert torch.equal(column[[2, 0]], expected[[7, 2]])
    assert torch.equal(column[1], expected[3])
    assert np.array_equal(column.numpy(), expected[[2, 3, 7]].numpy())
    assert column.rows.tolist() == [2, 3, 7]


def test_repr_says_what_it_is(store):
    assert repr(store[SITE]) == f"<Column {SITE} [8, 6] float32, 192 B, {store[SITE].tier} pages>"
    assert repr(store[f"{SITE}[0]"]) == f"<Column {SITE}[0] [3, 6] float32, 72 B, gathered>"


def test_a_column_can_be_pickled_for_other_processes(store, expected):
    again = pickle.loads(pickle.dumps(store[f"{SITE}[-1]"]))
    assert torch.equal(again.tensor, expected[[2, 3, 7]])
    assert torch.equal(copy.copy(store[SITE]).tensor, expected)


def test_iteration_gives_the_rows(store, expected):
    assert torch.equal(torch.stack(list(store[SITE])), expected)


def test_without_torch_numpy_works_and_the_rest_says_so(store, expected, monkeypatch):
    column = store[SITE]
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.dlpack", None)
    assert np.array_equal(column.numpy(), expected.numpy())
    assert np.array_equal(store[f"{SITE}[-1]"].numpy(), expected[[2, 3, 7]].numpy())
    with pytest.raises(lm.InputError, match=r"torch is not installed; `\.numpy\(\)` .* work"):
        _ = column.tensor

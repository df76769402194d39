"""`lm.create` and `lm.append`: the same store from any producer of tensors."""

from __future__ import annotations

import array
import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.stores import IDS, LENGTHS, SITES, WIDTH, make, numbers

import lamina as lm

SITE = "model.layers[7].output"
ROWS = torch.arange(24, dtype=torch.float32).reshape(6, 4)


@pytest.fixture
def acts(tmp_path):
    return tmp_path / "acts"


def begin(directory, **options):
    return lm.create(directory, sites={SITE: (4, "float32")}, **options)


class Producer:
    """Something that is neither torch's nor NumPy's, and speaks DLPack."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


PRODUCERS = {
    "torch": ROWS,
    "torch that needs gradients": (ROWS.clone().requires_grad_() * 1),
    "torch, transposed": ROWS.t().contiguous().t(),
    "torch, every second row": ROWS.repeat_interleave(2, 0)[::2],
    "torch, expanded": ROWS[:1].expand(6, 4),
    "torch, negative bit": (1j * ROWS).conj().imag,
    "numpy": ROWS.numpy(),
    "numpy, Fortran order": np.asfortranarray(ROWS.numpy()),
    "numpy, big endian": ROWS.numpy().astype(">f4"),
    "numpy, backwards": ROWS.numpy()[::-1],
    "dlpack": Producer(ROWS),
    "buffer": memoryview(ROWS.numpy()),
    "buffer of ctypes": (ctypes.c_float * 4 * 6)(*[tuple(row) for row in ROWS.tolist()]),
}


@pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)
def test_every_producer_is_stored_as_it_stands(acts, producer):
    with begin(acts) as writer:
        writer.append({SITE: producer}, tokens=range(6))
    expected = producer
    if isinstance(producer, Producer):
        expected = ROWS
    elif not isinstance(producer, torch.Tensor):
        expected = np.asarray(producer)
    assert lm.open(acts)[SITE].tensor.tolist() == expected.tolist()


@pytest.mark.cuda
def test_tensors_of_a_gpu_are_fetched(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS.cuda()}, tokens=range(6))
    assert torch.equal(lm.open(acts)[SITE].tensor, ROWS)


def test_a_column_of_another_store_is_a_producer(acts, tmp_path):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
    with begin(tmp_path / "copy") as writer:
        writer.append({SITE: lm.open(acts)[SITE]}, tokens=range(6))
    assert torch.equal(lm.open(tmp_path / "copy")[SITE].tensor, ROWS)


def test_sites_keep_structural_order_and_canonical_text(acts):
    sites = {"model.h.10.output": (1, "f32"), "model.h[2].output": (1, "f32"),
             "model.h[2].input": (1, "f32")}  # fmt: skip
    with lm.create(acts, sites=sites) as writer:
        writer.append({site: torch.ones(1, 1) for site in sites}, tokens=[1])
    assert lm.open(acts).sites == ("model.h[2].input", "model.h[2].output", "model.h[10].output")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16], ids=str
)
def test_dtypes_go_in_by_every_name_and_come_out_by_one(acts, dtype):
    with lm.create(acts, sites={SITE: ((4,), dtype)}) as writer:
        writer.append({SITE: ROWS.bfloat16()}, tokens=range(6))
    assert lm.open(acts)[SITE].dtype == "bfloat16"


def test_numpy_dtypes_go_in_too(acts):
    sites = {"model.a.output": (1, np.float16), "model.b.output": (1, np.dtype("int8"))}
    lm.create(acts, sites=sites).close()
    assert [column.dtype for _, column in lm.open(acts).items()] == ["float16", "int8"]


def test_tokens_without_lengths_are_one_prompt(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=torch.arange(6))
        writer.append({SITE: ROWS[:2]}, tokens=np.array([8, 9], dtype=np.uint16))
    store = lm.open(acts)
    assert [prompt.rows for prompt in store.prompts] == [slice(0, 6), slice(6, 8)]
    assert store.tokens.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]


def test_positions_say_which_tokens_are_given(acts):
    with begin(acts, positions=[0, -1]) as writer:
        writer.append({SITE: ROWS[:3]}, tokens=[5, 6, 7, 9], lengths=[3, 1])
    store = lm.open(acts)
    assert store.options["positions"] == "0,-1"
    assert store.tokens.tolist() == [5, 7, 9]
    assert store.positions.tolist() == [0, 2, 0]
    assert store[f"{SITE}[0,-1]"].rows.tolist() == [[0, 1], [2, 2]]
    assert store.prompts[0].ids.tolist() == [5, 6, 7]
    assert "positions [0,-1]" in repr(store)
    with lm.append(acts) as writer:  # the positions are the store's
        writer.append({SITE: ROWS[:2]}, tokens=[1, 2])
    assert store.refresh()
    assert store.rows == 5


def test_texts_are_kept_where_asked_for(acts):
    with begin(acts, texts=True) as writer:
        writer.append({SITE: ROWS}, tokens=range(6), lengths=[2, 4], texts=["a", "é\n"])
    assert [prompt.text for prompt in lm.open(acts).prompts] == ["a", "é\n"]


def test_several_appends_equal_one(acts, tmp_path):
    store = make(acts)
    values = numbers()
    with lm.create(tmp_path / "b", sites=dict.fromkeys(SITES, (WIDTH, "f32"))) as writer:
        row = 0
        for length in LENGTHS:
            part = slice(row, row + length)
            columns = {site: values[at, part] for at, site in enumerate(SITES)}
            writer.append(columns, tokens=IDS[part])
            row += length
    other = lm.open(tmp_path / "b")
    assert [shard[0] for shard in other.shards] == [shard[0] for shard in store.shards]


def test_append_continues_a_store(acts):
    with begin(acts, identity={"run": 1, "list": (1, 2)}) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
    with lm.append(acts, identity={"list": [1, 2], "run": 1}) as writer:
        assert (writer.rows, writer.prompts) == (6, 1)
        assert writer.sites == [(SITE, "float32", (4,))]
        writer.append({"model.layers.7.output": ROWS * 2}, tokens=range(6))
    store = lm.open(acts)
    assert torch.equal(store[SITE].tensor, torch.cat([ROWS, ROWS * 2]))
    assert store.complete
    assert len(store.prompts) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": 2}, "  run: the store has 1, given is 2"),
        ({}, "  run: the store has 1, given is nothing"),
        (None, "run"),
        ({"run": 1, "more": "x"}, '  more: the store has nothing, given is "x"'),
    ],
)
def test_append_refuses_another_identity_and_names_the_fields(acts, given, message):
    begin(acts, identity={"run": 1}).close()
    with pytest.raises(lm.IdentityError, match=message) as caught:
        lm.append(acts, identity=given)
    assert set(caught.value.fields) <= {"run", "more"}
    assert caught.value.fields
    lm.append(acts, identity={"run": 1}).close()  # the lock was given back


def test_an_exception_in_the_block_abandons_what_was_not_committed(acts):
    def fill():
        with begin(acts) as writer:
            writer.append({SITE: ROWS}, tokens=range(6))
            writer.commit()
            writer.append({SITE: ROWS}, tokens=range(6))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fill()
    store = lm.open(acts)
    assert (store.rows, store.complete) == (6, False)
    with lm.append(acts) as writer:
        writer.append({SITE: ROWS * 3}, tokens=range(6))
    assert torch.equal(lm.open(acts)[SITE].tensor, torch.cat([ROWS, ROWS * 3]))


def test_commit_makes_rows_visible_and_flush_does_not(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
        writer.flush()
        assert lm.open(acts).rows == 0
        version = writer.version
        writer.commit()
        assert writer.version == version + 1
        assert lm.open(acts).rows == 6


def test_an_append_commits_when_its_time_has_come(acts):
    with begin(acts, commit_seconds=0) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
        assert lm.open(acts).rows == 6


def test_a_writer_that_has_ended_says_so(acts):
    writer = begin(acts)
    writer.append({SITE: ROWS}, tokens=range(6))
    writer.close()
    writer.close()
    writer.abandon()
    assert writer.rows == 6
    assert writer.version == lm.open(acts).version
    assert "ended" in repr(writer)
    for use in (writer.flush, writer.commit, lambda: writer.append({SITE: ROWS})):
        with pytest.raises(lm.ClosedError, match="has ended"):
            use()


def test_a_writer_that_replaced_pieces_knows_the_last_version(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
        writer.commit()
        writer.append({SITE: ROWS}, tokens=range(6))
    assert writer.version == lm.open(acts).version


def test_repr_says_where_and_how_much(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
        assert repr(writer) == f"<Writer {acts}: 1 site, 16 B a row, 6 rows so far>"


def test_nothing_appended_is_no_window(acts):
    with begin(acts) as writer:
        writer.append({SITE: ROWS[:0]})
        assert (writer.rows, writer.prompts) == (0, 0)


REFUSED = {
    "shape": (
        {SITE: ROWS[:, :3]}, {"tokens": range(6)}, lm.InputError,
        r"model\.layers\[7\]\.output: expected \[rows, 4\], got \[6, 3\]",
    ),
    "no axis": ({SITE: torch.tensor(1.0)}, {}, lm.InputError, r"expected \[rows, 4\], got \[\]"),
    "dtype": (
        {SITE: ROWS.half()}, {"tokens": range(6)}, lm.DtypeError,
        r"model\.layers\[7\]\.output is stored as float32, and got float16 \[6, 4\]",
    ),
    "unknown dtype": ({SITE: ROWS.cfloat()}, {}, lm.DtypeError, "got complex64"),
    "unknown numpy dtype": ({SITE: ROWS.numpy() * 1j}, {}, lm.DtypeError, "got complex64"),
    "meta": ({SITE: ROWS.to("meta")}, {}, lm.InputError, "meta device and holds no numbers"),
    "sparse": ({SITE: ROWS.to_sparse()}, {}, lm.InputError, "a sparse_coo tensor cannot be stored"),
    "list": ({SITE: ROWS.tolist()}, {}, lm.InputError, "a list is no tensor"),
    "objects": ({SITE: np.array([None])}, {}, lm.InputError, "array of object is no tensor"),
    "flat buffer": ({SITE: array.array("f", [1.0] * 4)}, {}, lm.InputError, r"got \[4\]"),
    "no dict": (ROWS, {}, lm.InputError, "append takes a dict from each site to its rows, not a"),
    "missing": ({}, {}, lm.InputError, r"rows are missing for model\.layers\[7\]\.output"),
    "unknown": ({SITE: ROWS, "model.x.output": ROWS}, {}, lm.SiteNotFoundError, r"model\.x"),
    "twice": (
        {SITE: ROWS, "model.layers.7.output": ROWS}, {}, lm.InputError, "is given twice",
    ),
    "position": ({f"{SITE}[-1]": ROWS}, {}, lm.SiteNotFoundError, "is no single site of"),
    "sum": (
        {SITE: ROWS}, {"tokens": range(6), "lengths": [2, 3]}, lm.InputError,
        "lengths add up to 5 tokens, and tokens holds 6",
    ),
    "rows": (
        {SITE: ROWS}, {"tokens": range(5)}, lm.InputError,
        "lengths add up to 5 tokens, so 5 rows, and the tensors have 6 rows",
    ),
    "only lengths": ({SITE: ROWS}, {"lengths": [2, 3]}, lm.InputError, "5 tokens, so 5 rows"),
    "two-dimensional tokens": (
        {SITE: ROWS}, {"tokens": torch.ones(2, 3, dtype=torch.int64)}, lm.InputError,
        r"tokens must be integers in one dimension, not int64 \[2, 3\]",
    ),
    "floats": ({SITE: ROWS}, {"tokens": [0.5] * 6}, lm.InputError, "tokens must be integers"),
    "ragged": ({SITE: ROWS}, {"tokens": [[1], [2, 3]]}, lm.InputError, "values of several kinds"),
    "negative": ({SITE: ROWS}, {"tokens": [-1] * 6}, lm.InputError, "found -1"),
    "too large": ({SITE: ROWS}, {"tokens": [2**32 - 1] * 6}, lm.InputError, "found 4294967295"),
    "negative length": (
        {SITE: ROWS}, {"tokens": range(6), "lengths": [7, -1]}, lm.InputError, "found -1",
    ),
    "texts": ({SITE: ROWS}, {"tokens": range(6), "texts": ["a"]}, lm.InputError, "keeps no texts"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_appended(
    acts, columns, options, error, message
):
    with begin(acts) as writer:
        writer.append({SITE: ROWS}, tokens=range(6))
        with pytest.raises(error, match=message):
            writer.append(columns, **options)
        assert (writer.rows, writer.prompts) == (6, 1)
    assert torch.equal(lm.open(acts)[SITE].tensor, ROWS)


def test_sites_with_different_rows_are_refused(acts):
    sites = {"model.a.output": (4, "f32"), "model.b.output": (4, "f32")}
    message = r"model\.b\.output has 2 rows, model\.a\.output has 6: all sites need the same rows"
    with lm.create(acts, sites=sites) as writer, pytest.raises(lm.InputError, match=message):
        writer.append({"model.a.output": ROWS, "model.b.output": ROWS[:2]}, tokens=range(6))


def test_a_prompt_too_short_for_the_positions_is_named(acts):
    message = r"position \[1\] is outside 1 of 2 prompts: 3 \(1 token\)"
    with begin(acts, positions=1) as writer:
        writer.append({SITE: ROWS[:2]}, tokens=range(4), lengths=[2, 2])
        with pytest.raises(lm.PositionError, match=message):
            writer.append({SITE: ROWS[:2]}, tokens=range(3), lengths=[2, 1])
        with pytest.raises(lm.InputError, match=r"3 tokens, of which .* 1 row, .* have 2"):
            writer.append({SITE: ROWS[:2]}, tokens=range(3))
        with pytest.raises(lm.InputError, match="needs tokens=, not lengths= alone"):
            writer.append({SITE: ROWS[:2]}, lengths=[2, 2])


def test_texts_must_be_one_per_prompt(acts):
    with begin(acts, texts=True) as writer:
        for texts, message in (
            (None, "this store keeps texts: give texts="),
            (["a"], "1 text for 2 prompts"),
            ("ab", "a single text for 2 prompts"),
        ):
            with pytest.raises(lm.InputError, match=message):
                writer.append({SITE: ROWS}, tokens=range(6), lengths=[2, 4], texts=texts)


DECLARED = {
    "empty": ({}, lm.InputError, "needs at least one"),
    "pattern": ({"model.h[:].output": (1, "f32")}, lm.SiteError, "stands for several sites"),
    "negative": ({"model.h[-1].output": (1, "f32")}, lm.SiteError, "stands for several sites"),
    "position": ({"model.h[1].output[1:]": (1, "f32")}, lm.SiteError, "has a position"),
    "twice": (
        {"model.h[1].output": (1, "f32"), "model.h.1.output": (1, "f32")},
        lm.SiteError,
        "comes twice",
    ),
    "last": ({"model.h[1].output[-1]": (1, "f32")}, lm.SiteError, r"tokens pass positions=-1"),
    "no model": ({"h[1].output": (1, "f32")}, lm.PathError, r"mean `model\.h\[1\]\.output`"),
    "typo": ({"model.h[1": (1, "f32")}, lm.PathError, "at byte"),
    "dtype": ({SITE: (1, "float33")}, lm.DtypeError, "unknown dtype `float33`"),
    "no pair": ({SITE: 3}, lm.InputError, r"expected the shape of a row and its dtype"),
    "no dict": ([SITE], lm.InputError, "sites is a list; expected a dict from each path"),
    "text": ({SITE: "f4"}, lm.InputError, r"expected the shape of a row and its dtype"),
    "no length": ({SITE: (0, "f32")}, lm.InputError, r"got \(0, 'f32'\)"),
    "no shape": ({SITE: ("a", "f32")}, lm.InputError, r"got \('a', 'f32'\)"),
}


@pytest.mark.parametrize(("sites", "error", "message"), DECLARED.values(), ids=DECLARED)
def test_sites_that_cannot_be_declared_are_refused_before_anything_is_made(
    acts, sites, error, message
):
    with pytest.raises(error, match=message):
        lm.create(acts, sites=sites)
    assert not acts.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": {"a": object()}}, "identity must be fields with JSON values"),
        ({"identity": {"a": float("nan")}}, "identity must be fields with JSON values"),
        ({"identity": "run 1"}, "identity='run 1': identity is a dict of names to values"),
        ({"identity": {1: 2}}, "identity must have texts for names"),
        ({"recorded": {"a": {1, 2}}}, "recorded must be fields with JSON values"),
        ({"shard_bytes": 0}, "shard_bytes must be positive"),
        ({"positions": "x"}, "is no position"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_made(acts, options, message):
    with pytest.raises(lm.InputError, match=message):
        begin(acts, **options)
    assert not acts.exists()


def test_a_store_killed_while_it_is_written_goes_on_from_its_last_commit(acts):
    code = f"""
import os, signal, numpy as np, lamina as lm
writer = lm.create({str(acts)!r}, sites={{"{SITE}": (4, "float32")}})
rows = np.arange(24, dtype=np.float32).reshape(6, 4)
writer.append({{"{SITE}": rows}}, tokens=range(6))
writer.commit()
writer.append({{"{SITE}": rows}}, tokens=range(6))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == -9
    with lm.append(acts) as writer:
        assert writer.rows == 6
        writer.append({SITE: ROWS * 5}, tokens=range(6))
    store = lm.open(acts)
    assert torch.equal(store[SITE].tensor, torch.cat([ROWS, ROWS * 5]))
    assert store.verify().intact

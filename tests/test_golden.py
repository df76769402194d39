"""Stores that were made when the format was, read by the lamina of today."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import decoder
from tests.golden import make

import lamina as lm

GOLDEN = Path(__file__).parent / "golden" / "v1"
STORES = sorted(make.STORES)
FACTS = {  # rows, prompts, shards, complete
    "dtypes": (5, 2, 1, True),
    "pieces": (16, 6, 3, False),
    "prompts": (19, 12, 5, True),
    "tiny": (3, 2, 1, True),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_golden_stores_stay_small():
    assert sorted(path.name for path in GOLDEN.iterdir()) == STORES == sorted(FACTS)
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("name", STORES)
def test_a_golden_store_opens_and_is_intact(name):
    store = lm.open(GOLDEN / name)
    rows, prompts, shards, complete = FACTS[name]
    assert (store.rows, len(store.prompts), store.complete) == (rows, prompts, complete)
    assert len(store.shards) == shards
    result = store.verify()
    assert result.intact, result
    assert lm.open(GOLDEN / name, version=store.version - 1).verify().intact


@pytest.mark.parametrize("name", [name for name in STORES if name != "tiny"])
def test_golden_numbers_are_those_that_were_stored(name):
    store = lm.open(GOLDEN / name)
    for at, (path, column) in enumerate(store.items()):
        nbytes = column.tensor[:1].numel() * column.tensor.element_size()
        dtype = str(column.dtype).removeprefix("torch.")
        assert raw(column.tensor) == make.values(at, 0, store.rows, nbytes, dtype).tobytes(), path
        gathered = store.gather(path, list(range(store.rows)))
        assert isinstance(gathered, torch.Tensor)
        assert raw(gathered) == raw(column.tensor)


def test_golden_numbers_of_the_example():
    store = lm.open(GOLDEN / "tiny")
    column = store[make.TINY]
    assert column.tensor.tolist() == [[1.0, 1.5], [2.0, -2.5], [3.0, 0.0]]
    assert store.load(f"{make.TINY}[-1]").values.h[0].output[-1].tolist() == [
        [1.0, 1.5],
        [3.0, 0.0],
    ]
    assert [prompt.ids.tolist() for prompt in store.prompts] == [[5], [6, 7]]
    assert store.identity == {"run": 1}


def test_golden_prompts_are_those_that_were_stored():
    store = lm.open(GOLDEN / "prompts")
    lengths = [0, 3, 0, 2, 1, 2, 0, 10, 0, 1, 0, 0]
    assert [prompt.length for prompt in store.prompts] == lengths
    stops = np.cumsum(lengths).tolist()
    for at, prompt in enumerate(store.prompts):
        assert prompt.rows == slice(stops[at] - lengths[at], stops[at])
        assert prompt.ids.tolist() == [100 * at + token for token in range(lengths[at])]
        assert prompt.text == make.text(at)
        assert prompt.positions.tolist() == list(range(lengths[at]))
    assert store.tokens.tolist() == [token for prompt in store.prompts for token in prompt.ids]
    assert store.prompts[9].generated.tolist() == [True]
    assert not store.prompts[7].generated.any()


def test_golden_pieces_hold_the_last_four_tokens_of_each_prompt():
    store = lm.open(GOLDEN / "pieces")
    lengths = [6, 1, 9, 3, 5, 0]
    assert [prompt.length for prompt in store.prompts] == lengths
    for prompt, length in zip(store.prompts, lengths, strict=True):
        assert prompt.positions.tolist() == list(range(max(length - 4, 0), length))
        assert store.tokens[prompt.rows].tolist() == prompt.ids[-4:].tolist()


@pytest.mark.parametrize("name", STORES)
def test_golden_shards_open_with_safetensors_and_equal_the_columns(name):
    store = lm.open(GOLDEN / name)
    row = 0
    for file, _, rows, *_ in store.shards:
        tensors = load_file(GOLDEN / name / "shards" / file)
        for path, column in store.items():
            assert tensors[path].dtype == column.tensor.dtype
            assert raw(tensors[path]) == raw(column.tensor[row : row + rows])
        row += rows


@pytest.mark.parametrize("name", STORES)
def test_todays_writer_makes_the_same_bytes(name, tmp_path):
    make.STORES[name](tmp_path / name)
    assert files(tmp_path / name) == files(GOLDEN / name)


def files(store: Path) -> dict[str, object]:
    """Return what the files hold, without what is random or tells the time."""
    found: dict[str, object] = {}
    for path in sorted(store.rglob("*")):
        name = str(path.relative_to(store))
        if path.suffix == ".json":
            manifest = decoder.read_manifest(path.read_bytes())
            del manifest["store"], manifest["created"]
            found[name] = json.dumps(manifest)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found

"""The `values` tree: attributes, indices, completion, and what it says when nothing is there."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.stores import SITES, make

import lamina as lm


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "acts")


def test_attributes_and_indices_lead_to_a_column(store):
    column = store.values.layers[1].output[-1]
    assert column.path == f"{SITES[1]}[-1]"
    assert torch.equal(column.tensor, store[f"{SITES[1]}[-1]"].tensor)
    assert store.values.layers[1].output[:].path == SITES[1]
    assert store.values.layers[1].output[0, -1].shape == (3, 2, 6)


def test_a_port_also_answers_as_its_whole_column(store):
    port = store.values.layers[2].output
    assert port.shape == (8, 6)
    assert port.dtype == "float32"
    assert torch.equal(port.tensor, store[SITES[2]].tensor)


def test_iteration_goes_over_what_is_there(store):
    assert [node.output.path for node in store.values.layers] == SITES  # 3 to 9 are not stored
    assert torch.equal(torch.stack(list(store.values.layers[2].output)), store[SITES[2]].tensor)
    assert len(store.values.layers[2].output) == 8
    assert store.values


def test_names_complete_in_notebooks(store):
    assert dir(store.values) == ["layers"]
    assert store.values.layers._ipython_key_completions_() == [0, 1, 2, 10]
    assert dir(store.values.layers[0]) == ["output"]
    assert len(store.values.layers) == 4
    assert repr(store.values.layers) == "<Values model.layers: [0], [1], [2] and [10]>"


def test_what_is_not_there_is_refused_with_what_is(store):
    with pytest.raises(AttributeError, match=r"model\.heads; there is layers"):
        _ = store.values.heads
    with pytest.raises(IndexError, match=r"model\.layers\[3\]; there is \[0\], \[1\]"):
        store.values.layers[3]
    with pytest.raises(lm.SiteNotFoundError, match=r"model\['heads'\]"):
        store.values["heads"]
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        _ = store.values.layers[0].output.nothing
    assert not hasattr(store.values, "_repr_pretty_")
    assert copy.copy(store.values.layers)[0] is store.values.layers[0]


def test_modules_called_output_calls_and_elements_nest(tmp_path):
    sites = {
        "model.layer[0].output": (1, "f32"),
        "model.layer[0].output.output": (1, "f32"),
        "model.layer[0].attention.output@2": (1, "f32"),
        "model.layer[0].attention.self.output[1]": (1, "f32"),
        "model.layer[0].attention.self.input.mask": (1, "f32"),
        "model.output": (1, "f32"),
    }
    with lm.create(tmp_path / "acts", sites=sites) as writer:
        rows = {site: torch.full((2, 1), float(at)) for at, site in enumerate(sites)}
        writer.append(rows, tokens=[1, 2])
    values = lm.open(tmp_path / "acts").values
    layer = values.layer[0]
    assert layer.output[-1].tensor.item() == 0
    assert layer.output.output[-1].tensor.item() == 1
    assert layer.attention.output["@2"][-1].tensor.item() == 2
    assert layer.attention.self.output[1][-1].tensor.item() == 3
    assert layer.attention.self.input.mask[0].tensor.item() == 4
    assert values.output[-1].tensor.item() == 5


def test_what_is_written_otherwise_is_explained(store, tmp_path):
    with pytest.raises(
        IndexError, match=r"name one \(there is \[0\], .*or use store\['model\.layers"
    ):
        store.values.layers[0:2]
    with pytest.raises(TypeError, match=r"tree of sites, not a method"):
        store.values()
    assert store.values.model.layers[1].output.path == SITES[1]
    site = "model.model.layers[0].output"
    with lm.create(tmp_path / "root", sites={site: (1, "f32")}) as writer:
        writer.append({site: torch.ones(2, 1)}, tokens=[1, 2])
    values = lm.open(tmp_path / "root").values
    assert values.model.model.layers[0].output.path == site
    assert values.model.layers[0].output.path == site

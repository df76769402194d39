"""`SavedActivation`: what `Store.load` returns."""

from __future__ import annotations

import pytest
import torch
from tests.stores import SITES, make, numbers

import lamina as lm

VALUES = torch.from_numpy(numbers())
LAST = [f"{site}[-1]" for site in SITES]


@pytest.fixture
def saved(tmp_path):
    return make(tmp_path / "acts", identity={"run": 1}).load("model.layers[:].output[0,-1]")


def test_it_is_an_ordered_mapping_from_targets_to_tensors(saved):
    assert list(saved) == [f"{site}[{at}]" for site in SITES for at in (-1, 0)]
    assert list(saved.keys()) == [path for path, _ in saved.items()]
    assert len(saved) == 8
    assert torch.equal(saved[LAST[2]], VALUES[2, [2, 3, 7]])
    assert torch.equal(dict(saved.items())[f"{SITES[0]}[0]"], VALUES[0, [0, 3, 4]])
    assert saved.identity == {"run": 1}
    assert saved.lengths == {}


def test_paths_are_found_in_every_spelling(saved):
    assert torch.equal(saved["model.layers.2.output[ -1 ]"], saved[LAST[2]])
    assert "model.layers.2.output[-1]" in saved
    assert "model.layers[2].output[5]" not in saved
    assert "model.layers[2].output" not in saved  # two targets, not one
    assert "nonsense[" not in saved
    assert 3 not in saved
    assert saved.get("model.layers[2].output[5]") is None


def test_an_unknown_path_is_refused_with_those_kept(saved):
    with pytest.raises(lm.SiteNotFoundError, match=r"output\[5\] is no single target here; kept"):
        saved["model.layers[2].output[5]"]
    with pytest.raises(lm.SiteNotFoundError, match="layers"):
        saved["model.layers[3].output[-1]"]


@pytest.mark.parametrize(
    ("paths", "kept"),
    [
        (LAST[1], [LAST[1]]),
        ([LAST[3], LAST[0]], [LAST[0], LAST[3]]),
        ("model.layers[:].output[-1]", LAST),
        ("model.layers[0:2].output", [f"{site}[{at}]" for site in SITES[:2] for at in (-1, 0)]),
        (["model.layers[2].output[-1,0]"], [f"{SITES[2]}[-1]", f"{SITES[2]}[0]"]),
    ],
)
def test_subset_keeps_the_order_and_shares_the_tensors(saved, paths, kept):
    part = saved.subset(paths)
    assert list(part) == kept
    assert all(part[path] is saved[path] for path in kept)
    assert part.identity == saved.identity


def test_subset_refuses_what_matches_nothing(saved):
    with pytest.raises(lm.SiteNotFoundError, match=r"output\[7\]"):
        saved.subset(["model.layers[:].output[-1]", "model.layers[:].output[7]"])


def test_values_lead_to_the_tensors(saved):
    assert saved.values.layers[2].output[-1] is saved[LAST[2]]
    assert dir(saved.values.layers[2]) == ["output"]
    with pytest.raises(
        IndexError, match=r"position \[5\] of .* not kept; there is \[-1\] and \[0\]"
    ):
        saved.values.layers[2].output[5]


def test_the_whole_of_a_site_is_the_value_itself(tmp_path):
    saved = make(tmp_path / "acts").load(SITES[1], prompts=[2])
    assert torch.equal(saved.values.layers[1].output, VALUES[1, 4:])
    assert saved.lengths[SITES[1]].tolist() == [4]


def test_tensors_are_copies_of_their_own(tmp_path):
    store = make(tmp_path / "acts")
    saved = store.load(LAST[0])
    saved[LAST[0]].fill_(-1)
    assert torch.equal(store.load(LAST[0])[LAST[0]], VALUES[0, [2, 3, 7]])
    assert torch.equal(store[SITES[0]].tensor, VALUES[0])
    assert saved[LAST[0]].untyped_storage().nbytes() < 4096 * 2


def test_repr_lists_targets_with_shape_and_dtype(saved):
    lines = repr(saved).splitlines()
    assert lines[0] == "<SavedActivation: 8 targets, 576 B>"
    assert lines[1] == "  model.layers[0].output[-1]  [3, 6] float32"
    assert "<td" in saved._repr_html_()
    assert "model.layers[0].output[-1]" in saved._repr_html_()

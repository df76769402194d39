"""Opening a store: sites, targets, positions, gather, load, refresh, verify, and what it says."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from tests.stores import IDS, LENGTHS, SITES, WIDTH, make, numbers

import lamina as lm
from lamina import _core

SITE = SITES[1]
VALUES = torch.from_numpy(numbers())


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "acts", identity={"run": 1}, recorded={"model_name": "toy"})


def test_a_store_is_a_mapping_of_sites_in_order(store):
    assert store.sites == tuple(SITES)
    assert list(store) == list(store.keys()) == SITES
    assert len(store) == 4
    assert [path for path, _ in store.items()] == SITES
    assert all(torch.equal(c.tensor, VALUES[at]) for at, (_, c) in enumerate(store.items()))
    assert SITE in store
    assert "model.layers[1:2].output" in store
    assert "model.layers[3].output" not in store
    assert "no path [" not in store
    assert 3 not in store
    assert store.get("model.nothing.output", 7) == 7
    assert store.get(SITE).shape == (8, WIDTH)


def test_facts_of_a_store(store, tmp_path):
    assert (store.rows, len(store.prompts), store.version >= 1) == (8, 3, True)
    assert store.complete
    assert store.directory == str(tmp_path / "acts")
    assert store.identity == {"run": 1}
    assert store.recorded["model_name"] == "toy"
    assert store.options["positions"] == ":"
    assert store.tokens.tolist() == IDS
    assert store.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert store.nbytes >= 8 * 4 * WIDTH * 4
    assert sum(shard[2] for shard in store.shards) == 8


@pytest.mark.parametrize(
    "text",
    [
        "model.layers[1].output",
        "model.layers.1.output",
        "model.layers[ 1 ].output",
        "model.layers[1].output@0",
        "model.layers[1].output[:]",
        "model.layers[-10].output",
        _core.Path("model.layers[1].output"),
    ],
    ids=str,
)
def test_every_spelling_finds_the_site(store, text):
    column = store[text]
    assert column.path == SITE
    assert torch.equal(column.tensor, VALUES[1])


def test_a_name_below_the_root_is_found_by_its_own_name(tmp_path):
    sites = {"model.model.layers[0].output": (2, "f32")}
    with lm.create(tmp_path / "acts", sites=sites) as writer:
        writer.append({"model.layers[0].output": torch.ones(1, 2)}, tokens=[1])
    store = lm.open(tmp_path / "acts")
    assert store["model.layers[0].output[-1]"].path == "model.model.layers[0].output[-1]"


def test_an_unknown_site_is_refused_with_the_nearest(store):
    with pytest.raises(lm.SiteNotFoundError, match=r"model\.layers"):
        store["model.layerz[1].output"]
    with pytest.raises(lm.PathError, match="byte"):
        store["model.layers[1.output"]
    with pytest.raises(
        lm.PathError, match=r"byte 0.*; did you mean `model\.layers\[1\]\.output`\?"
    ):
        store["layers[1].output"]
    with pytest.raises(lm.SiteNotFoundError, match=r"write `\[:\]`: `model\.layers\[:\]\.output`"):
        store["model.layers.*.output"]


def test_patterns_give_columns_in_the_order_of_the_store(store):
    columns = store["model.layers[:].output[-1]"]
    assert list(columns) == [f"{site}[-1]" for site in SITES]
    assert len(columns) == 4
    stacked = torch.stack([column.tensor for column in columns.values()])
    assert torch.equal(stacked, VALUES[:, [2, 3, 7]])
    assert list(store["model.layers[10,0].output"]) == [SITES[0], SITES[3]]
    assert list(store["model.layers[1:2].output"]) == [SITE]
    assert repr(columns).splitlines()[1] == f"  {SITES[0]}[-1]  [3, 6] float32"


def test_columns_are_found_by_any_spelling(store):
    columns = store["model.layers[0:3].output"]
    assert columns["model.layers.1.output"].path == SITE
    with pytest.raises(lm.SiteNotFoundError, match=r"layers\[10\]\.output is not among"):
        columns["model.layers[10].output"]


@pytest.mark.parametrize(
    ("position", "rows", "lengths"),
    [
        ("[0]", [0, 3, 4], [1, 1, 1]),
        ("[-1]", [2, 3, 7], [1, 1, 1]),
        ("[0, -1]", [[0, 2], [3, 3], [4, 7]], [2, 2, 2]),
        ("[-1,0]", [[2, 0], [3, 3], [7, 4]], [2, 2, 2]),
        ("[-2:]", [1, 2, 3, 6, 7], [2, 1, 2]),
        ("[1:]", [1, 2, 5, 6, 7], [2, 0, 3]),
        ("[::2]", [0, 2, 3, 4, 6], [2, 1, 2]),
        ("[1::2]", [1, 5, 7], [1, 0, 2]),
        ("[:-1]", [0, 1, 4, 5, 6], [2, 0, 3]),
        ("[9:]", [], [0, 0, 0]),
        ("[-3:-1]", [0, 1, 5, 6], [2, 0, 2]),
    ],
)
def test_positions_select_rows_prompt_by_prompt(store, position, rows, lengths):
    column = store[SITE + position]
    wanted = VALUES[1][torch.tensor(rows, dtype=torch.int64)]
    assert column.shape == tuple(wanted.shape)
    assert torch.equal(column.tensor, wanted)
    assert column.lengths.tolist() == lengths


def test_a_short_prompt_raises_when_the_column_is_made(store):
    with pytest.raises(lm.PositionError, match=r"position 2 lies outside prompt 1 \(1 token\)"):
        store[f"{SITE}[2]"]
    with pytest.raises(lm.PositionError, match=r"\[-1:\] takes what is there"):
        store["model.layers[:].output[0,-2]"]


def test_a_position_stored_under_another_name_is_answered(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}, positions=-1) as writer:
        writer.append({SITE: torch.tensor([[1.0], [2.0]])}, tokens=[4, 5], lengths=[1, 1])
    assert lm.open(tmp_path / "acts")[f"{SITE}[0]"].tensor.tolist() == [[1.0], [2.0]]


def test_a_position_not_stored_is_refused_with_those_that_are(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}, positions=-1) as writer:
        writer.append({SITE: torch.tensor([[1.0], [2.0]])}, tokens=[4, 5, 6], lengths=[1, 2])
    store = lm.open(tmp_path / "acts")
    message = "position 0 of prompt 1 was not stored; the stored positions are -1"
    with pytest.raises(lm.PositionError, match=message):
        store[f"{SITE}[0]"]
    assert store[f"{SITE}[0:]"].rows.tolist() == [0, 1]


def test_gather_gives_rows_of_several_sites_in_one_tensor(store):
    block = store.gather("model.layers[:].output", [5, 0, 5])
    assert block.shape == (3, 4, WIDTH)
    assert torch.equal(block, VALUES[:, [5, 0, 5]].transpose(0, 1))
    assert store.gather(SITE, slice(2, 4)).shape == (2, 1, WIDTH)
    assert store.gather(SITE, 3).shape == (1, WIDTH)
    assert store.gather(SITE, np.array([[0, 1], [2, 3]])).shape == (2, 2, 1, WIDTH)
    swapped = store.gather([SITES[2], SITES[0]], [1])
    assert torch.equal(swapped[0], VALUES[[2, 0], 1])
    mask = store.tokens > 30
    assert torch.equal(store.gather(SITE, mask)[:, 0], VALUES[1, 4:])


def test_gather_of_different_widths_gives_a_dict(tmp_path):
    sites = {"model.a.output": (2, "f32"), "model.b.output": (3, "f32")}
    a, b = torch.rand(4, 2), torch.rand(4, 3)
    with lm.create(tmp_path / "acts", sites=sites) as writer:
        writer.append({"model.a.output": a, "model.b.output": b}, tokens=range(4))
    rows = lm.open(tmp_path / "acts").gather(list(sites), [3, 0])
    assert list(rows) == list(sites)
    assert torch.equal(rows["model.a.output"], a[[3, 0]])
    assert torch.equal(rows["model.b.output"], b[[3, 0]])


def test_gather_into_a_tensor_of_ones_own(store):
    out = torch.zeros(2, 4, WIDTH)
    assert store.gather("model.layers[:].output", [7, 1], out=out) is out
    assert torch.equal(out, VALUES[:, [7, 1]].transpose(0, 1))
    with pytest.raises(lm.InputError, match=r"out must be \[1, 4, 6\] float32, not \[2, 4, 6\]"):
        store.gather("model.layers[:].output", [7], out=out)
    with pytest.raises(lm.InputError, match=r"float32, not .* float64"):
        store.gather("model.layers[:].output", [7, 1], out=out.double())
    with pytest.raises(lm.InputError, match="contiguous"):
        store.gather("model.layers[:].output", [7, 1], out=torch.zeros(4, 2, WIDTH).transpose(0, 1))
    with pytest.raises(lm.InputError, match="out must be a torch tensor, not a ndarray"):
        store.gather("model.layers[:].output", [7, 1], out=out.numpy())


def test_gather_refuses_positions_and_rows_that_are_not_there(store):
    with pytest.raises(lm.InputError, match=r"model\.layers\[1\]\.output\[-1\] has a position"):
        store.gather(f"{SITE}[-1]", [0])
    with pytest.raises(lm.PositionError, match="8 lies outside the rows of the store"):
        store.gather(SITE, [0, 8])
    with pytest.raises(lm.InputError, match="at least one site"):
        store.gather([], [0])


def test_load_takes_targets_of_some_prompts_in_their_order(store):
    saved = store.load("model.layers[:].output[-1]", prompts=[2, 0])
    assert list(saved) == [f"{site}[-1]" for site in SITES]
    for at, tensor in enumerate(saved._entries.values()):
        assert torch.equal(tensor.tensor, VALUES[at, [7, 2]])
    assert saved.identity == {"run": 1}
    assert store.load(f"{SITE}[0]", prompts=1)[f"{SITE}[0]"].shape == (1, WIDTH)


def test_load_of_a_list_is_one_target_each_and_of_rows_has_lengths(store):
    saved = store.load([f"{SITE}[0,-1]", SITES[0], f"{SITE}[-1]", f"{SITE}[-2:]"])
    assert list(saved) == [SITES[0], f"{SITE}[-2:]", f"{SITE}[-1]", f"{SITE}[0]"]
    assert torch.equal(saved[SITES[0]], VALUES[0])
    assert saved.lengths[SITES[0]].tolist() == LENGTHS
    assert saved.lengths[f"{SITE}[-2:]"].tolist() == [2, 1, 2]
    assert f"{SITE}[-1]" not in saved.lengths


def test_load_names_prompts_that_lack_the_position(store):
    with pytest.raises(lm.PositionError, match=r"prompt 1 \(1 token\)"):
        store.load(f"{SITE}[-2]")
    assert store.load(f"{SITE}[-2]", prompts=[0, 2]).keys() == {f"{SITE}[-2]"}
    with pytest.raises(lm.PositionError, match="3 lies outside the prompts"):
        store.load(f"{SITE}[-1]", prompts=[3])


def test_refresh_moves_on_and_columns_made_before_stay(tmp_path):
    rows = np.ones((2, 1), dtype=np.float32)
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        writer.append({SITE: rows}, tokens=[1, 2])
        writer.commit()
        store = lm.open(tmp_path / "acts")
        before, version = store[SITE], store.version
        assert not store.complete
        assert not store.refresh()
        writer.append({SITE: rows * 2}, tokens=[3, 4])
        writer.commit()
        assert store.rows == 2
        assert store.refresh()
        assert store.version > version
        assert store[SITE].tensor.tolist() == [[1.0], [1.0], [2.0], [2.0]]
        assert store.tokens.tolist() == [1, 2, 3, 4]
        assert before.tensor.tolist() == [[1.0], [1.0]]
    assert store.refresh()
    assert store.complete


def test_an_earlier_version_opens_while_it_is_kept(tmp_path):
    rows = np.ones((1, 1), dtype=np.float32)
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        for _ in range(3):
            writer.append({SITE: rows}, tokens=[1])
            writer.commit()
        newest = lm.open(tmp_path / "acts")
        assert lm.open(tmp_path / "acts", version=newest.version - 1).rows == newest.rows - 1
        for gone in (newest.version - 2, newest.version + 1):
            with pytest.raises(lm.VersionNotFoundError, match=str(gone)):
                lm.open(tmp_path / "acts", version=gone)


def test_verify_reports_an_intact_store(store):
    calls = []
    report = store.verify(threads=1, progress=lambda done, total: calls.append((done, total)))
    assert report.intact
    assert report.damage == ()
    assert report.shards == 1
    assert report.nbytes == store.shards[0][5]
    assert str(report).startswith("intact: ")
    assert calls[-1][0] == calls[-1][1]


def test_info_is_json_and_repr_says_what_is_inside(store):
    info = json.loads(json.dumps(store.info()))
    assert (info["rows"], info["prompts"], info["complete"]) == (8, 3, True)
    assert info["format"] == _core.FORMAT
    assert info["model"] == "toy"
    assert [site["path"] for site in info["sites"]] == SITES
    assert info["sites"][0]["shape"] == [WIDTH]
    text = repr(store)
    for part in (
        "model     toy",
        "sites     4: model.layers[0].output … model.layers[10].output",
        "each      [6] float32",
        "rows      8 of 3 prompts",
        "in 1 shard",
        "complete",
        "UTC",
    ):
        assert part in text
    assert all(part.strip() for part in text.splitlines())


def test_one_site_of_a_kind_is_one_site(tmp_path):
    sites = {"model.a.output": (1, "f32"), "model.b.output": (2, "f32")}
    with lm.create(tmp_path / "acts", sites=sites):
        pass
    assert "[1] float32 (1 site) and [2] float32 (1 site)" in repr(lm.open(tmp_path / "acts"))


def test_the_notebook_table_escapes_what_others_wrote(tmp_path):
    store = make(tmp_path / "acts", recorded={"model_name": "<script>alert(1)</script>"})
    html = store._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_store_can_be_pickled_for_other_processes(store):
    again = pickle.loads(pickle.dumps(store))
    assert (again.version, again.rows) == (store.version, store.rows)


def test_what_a_store_says_of_itself_can_be_changed_without_harm(store):
    for facts in (store.identity, store.options, store.recorded):
        facts["extra"] = 1
    assert "extra" not in store.identity | store.options | store.recorded
    store.positions[:] = 0
    assert store.prompts.place_of([7])[1].tolist() == [3]


def test_a_store_without_rows_opens(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (WIDTH, "f32")}):
        pass
    store = lm.open(tmp_path / "acts")
    assert (store.rows, len(store.prompts), store.complete) == (0, 0, True)
    assert store[SITE].tensor.shape == (0, WIDTH)
    assert store[f"{SITE}[-1]"].tensor.shape == (0, WIDTH)
    assert store.verify().intact
    assert "0 of 0 prompts" in repr(store)

"""Rules of reading that no other file covers: generated rows, left-out prompts, negative layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.models import llama

import lamina as lm
from lamina import _core

SITE = "model.h[0].output"


@pytest.fixture
def generated(tmp_path):
    """A store of two prompts of 3 and 1 tokens, with 2 and 0 generated rows."""
    writer = _core.Writer(str(tmp_path / "acts"))
    writer.begin([(SITE, "float32", (1,))], identity="{}", about='{"options": {}}', rows_total=None)
    writer.append(
        [np.arange(6, dtype=np.float32).view(np.uint8)],
        tokens=np.array([7, 8, 9, 50, 51, 7], dtype=np.uint32),
        positions=np.array([0, 1, 2, 3, 4, 0], dtype=np.uint32),
        flags=np.array([0, 0, 0, 1, 1, 0], dtype=np.uint8),
        prompt_rows=np.array([5, 1], dtype=np.uint64),
        prompt_lengths=np.array([3, 1], dtype=np.uint64),
        prompt_ids=np.array([7, 8, 9, 7], dtype=np.uint32),
    )
    writer.finish()
    return lm.open(tmp_path / "acts")


def test_the_last_position_is_that_of_the_prompt_also_with_generated_rows(generated):
    assert generated[f"{SITE}[-1]"].rows.tolist() == [2, 5]
    assert generated.prompts.lengths.tolist() == [3, 1]
    assert generated.prompts[0].rows == slice(0, 5)
    assert generated.prompts[0].generated.tolist() == [False, False, False, True, True]
    assert generated.prompts[0].ids.tolist() == [7, 8, 9]


def test_generated_tokens_count_onward_from_the_length(generated):
    assert generated.prompts.rows_at(0, 3).tolist() == [3]
    assert generated.prompts.rows_at([0, 0], [4, 0]).tolist() == [4, 0]
    assert generated[f"{SITE}[:]"].lengths.tolist() == [5, 1]
    assert generated[f"{SITE}[3:]"].rows.tolist() == [3, 4]
    assert generated[f"{SITE}[-1:]"].rows.tolist() == [2, 3, 4, 5]
    assert generated[f"{SITE}[:-1]"].rows.tolist() == [0, 1]


def test_positions_beyond_what_was_generated_are_outside(generated):
    with pytest.raises(lm.PositionError, match=r"position 5 lies outside prompt 0"):
        generated.prompts.rows_at(0, 5)
    with pytest.raises(lm.PositionError, match=r"position 3 lies outside prompt 1 \(1 token\)"):
        generated[f"{SITE}[3]"]


def test_a_list_repeats_the_row_of_a_one_token_prompt(generated):
    column = generated[f"{SITE}[0,-1]"]
    assert column.rows.tolist() == [[0, 2], [5, 5]]
    assert column.shape == (2, 2, 1)


def captured(directory, prompts, sites="model.layers[:].output", **options):
    return lm.capture(llama(), prompts, sites, to=directory, progress=False, **options)


def test_prompts_left_out_keep_their_index(tmp_path):
    prompts = [[1, 2, 3], [4], [], [5, 6]]
    store = captured(tmp_path / "acts", prompts, positions=1, short="drop", empty="skip")
    assert [prompt.rows for prompt in store.prompts] == [
        slice(0, 1), slice(1, 1), slice(1, 1), slice(1, 2),
    ]  # fmt: skip
    assert store.prompts[1].ids.tolist() == [4]
    assert store.prompts[2].ids.tolist() == []
    with pytest.raises(lm.PositionError, match=r"prompts 1 \(1 token\) and 2 \(0 tokens\)"):
        store["model.layers[0].output[1]"]
    column = store["model.layers[0].output[1:2]"]
    assert column.lengths.tolist() == [1, 0, 0, 1]
    assert column.tensor.shape == (2, 32)
    assert store.load("model.layers[0].output[1]", prompts=[3, 0])


def test_a_negative_layer_counts_the_layers_of_the_model_not_of_the_store(tmp_path):
    store = captured(tmp_path / "acts", [[1, 2]], "model.layers[0:2].output")
    assert store["model.layers[-2].output"].site == "model.model.layers[1].output"
    with pytest.raises(lm.SiteNotFoundError, match=r"no \[-1\], which is \[2\]"):
        store["model.layers[-1].output"]


def test_brackets_behind_a_tuple_are_first_its_element_then_the_position(tmp_path):
    site = "model.layers[0].self_attn.output[0]"
    store = captured(tmp_path / "acts", [[1, 2, 3], [4]], [site, "model.layers[0].output"])
    assert store[site].shape == (4, 32)
    assert store[f"{site}[-1]"].rows.tolist() == [2, 3]
    assert store["model.layers[0].output[0]"].rows.tolist() == [0, 3]
    saved = store.load([f"{site}[0,-1]"])
    assert list(saved) == [f"model.{site}[-1]", f"model.{site}[0]"]
    assert torch.equal(
        saved.values.model.layers[0].self_attn.output[0][-1], store[f"{site}[-1]"].tensor
    )


def test_sites_stand_in_execution_order_and_so_do_patterns(tmp_path):
    sites = ["model.layers[:].mlp.output", "model.layers[:].self_attn.output[0]"]
    store = captured(tmp_path / "acts", [[1, 2]], sites)
    names = [path.split("]", 1)[1] for path in store.sites]
    assert names == [".self_attn.output[0]", ".mlp.output"] * 3
    assert list(store["model.layers[2,0].mlp.output"]) == [
        "model.model.layers[0].mlp.output", "model.model.layers[2].mlp.output",
    ]  # fmt: skip


def test_a_store_that_is_being_begun_names_the_process(tmp_path):
    writer = _core.Writer(str(tmp_path / "acts"))
    with pytest.raises(lm.StoreNotReadyError, match=f"no committed version yet.*{os.getpid()}"):
        lm.open(tmp_path / "acts")
    with pytest.raises(lm.StoreInUseError):
        lm.create(tmp_path / "acts", sites={SITE: (1, "f32")})
    writer.close()
    lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}).close()  # begun and left: as if empty
    assert lm.open(tmp_path / "acts").complete


def test_a_reader_in_another_process_sees_each_commit(tmp_path):
    code = """
import sys, lamina as lm
store = lm.open(sys.argv[1])
for line in sys.stdin:
    store.refresh()
    print(store.rows, store.complete, float(store["model.h[0].output"].numpy().sum()), flush=True)
"""
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        reader = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "acts"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert reader.stdin is not None
        assert reader.stdout is not None
        seen = []
        for _ in range(3):
            writer.append({SITE: np.ones((2, 1), dtype=np.float32)}, tokens=[1, 2])
            writer.commit()
            reader.stdin.write("\n")
            reader.stdin.flush()
            seen.append(reader.stdout.readline().split())
    reader.communicate("")
    assert seen == [["2", "False", "2.0"], ["4", "False", "4.0"], ["6", "False", "6.0"]]


def test_the_json_of_info_is_the_same_from_the_command_line(generated):
    command = [sys.executable, "-m", "lamina", "info", "--json", generated.directory]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == generated.info()

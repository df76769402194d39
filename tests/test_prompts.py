"""Prompts, and the way from a row to its token and back."""

from __future__ import annotations

import numpy as np
import pytest
from tests.stores import IDS, LENGTHS, SITES, WIDTH, make

import lamina as lm

SITE = SITES[0]


@pytest.fixture
def prompts(tmp_path):
    return make(tmp_path / "acts", texts=True).prompts


def test_a_prompt_has_rows_length_positions_ids_and_text(prompts):
    prompt = prompts[2]
    assert (prompt.index, prompt.rows, prompt.length) == (2, slice(4, 8), 4)
    assert prompt.positions.tolist() == [0, 1, 2, 3]
    assert prompt.ids.tolist() == prompt.tokens.tolist() == IDS[4:]
    assert prompt.text == "e f g h"
    assert not prompt.generated.any()
    assert repr(prompt) == "<Prompt 2: 4 tokens, rows 4:8, 'e f g h'>"


def test_prompts_are_a_sequence(prompts):
    assert len(prompts) == 3
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    assert prompts[-1].index == 2
    assert [prompt.index for prompt in prompts[1:]] == [1, 2]
    assert [prompt.index for prompt in reversed(prompts)] == [2, 1, 0]
    assert prompts.lengths.tolist() == prompts.row_counts.tolist() == LENGTHS
    assert repr(prompts) == "<Prompts: 3 prompts, 8 rows>"


def test_iteration_over_many_prompts_goes_on_across_blocks(tmp_path):
    count = 5000
    rows = np.zeros((count, 1), dtype=np.float32)
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        writer.append({SITE: rows}, tokens=[1] * count, lengths=[1] * count)
    starts = [prompt.rows.start for prompt in lm.open(tmp_path / "acts").prompts]
    assert starts == list(range(count))


@pytest.mark.parametrize("index", [3, -4])
def test_a_prompt_that_is_not_there_is_named(prompts, index):
    with pytest.raises(lm.PositionError, match=rf"{index} lies outside the prompts \(0 to 2\)"):
        prompts[index]


def test_rows_and_places_are_inverse(prompts):
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert [prompts.place_of(row) for row in range(8)] == places
    assert prompts.place_of(-1) == (2, 3)
    numbers, positions = prompts.place_of([7, 0, 3])
    assert numbers.tolist() == [2, 0, 1]
    assert positions.tolist() == [3, 0, 0]
    found = prompts.rows_at([prompt for prompt, _ in places], [at for _, at in places])
    assert found.tolist() == list(range(8))


def test_negative_positions_count_from_the_end_of_each_prompt(prompts):
    assert prompts.rows_at(None, -1).tolist() == [2, 3, 7]
    assert prompts.rows_at([2, 0], -3).tolist() == [5, 0]
    assert prompts.rows_at(slice(1, None), 0).tolist() == [3, 4]
    assert prompts.rows_at(2, 1).tolist() == [5]


def test_a_short_prompt_is_named_with_its_length(prompts):
    with pytest.raises(lm.PositionError, match=r"position 1 lies outside prompt 1 \(1 token\)"):
        prompts.rows_at(None, 1)
    with pytest.raises(lm.PositionError, match=r"-4 lies outside prompts 0 \(3 t.*\) and 1 \(1 t"):
        prompts.rows_at(None, -4)


def test_positions_for_another_number_of_prompts_are_refused(prompts):
    with pytest.raises(lm.InputError, match="2 prompts and 3 positions"):
        prompts.rows_at([0, 1], [0, 0, 0])


def test_a_row_outside_is_named(prompts):
    with pytest.raises(lm.PositionError, match="8 lies outside the rows of the store"):
        prompts.place_of(8)


def test_rows_without_tokens_are_prompts_without_ids(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (WIDTH, "f32")}) as writer:
        writer.append({SITE: np.zeros((3, WIDTH), dtype=np.float32)})
    store = lm.open(tmp_path / "acts")
    assert len(store.prompts) == 3
    assert store.tokens.tolist() == [-1, -1, -1]
    assert store.prompts[1].ids.tolist() == []
    assert store.prompts[1].rows == slice(1, 2)
    assert store[f"{SITE}[-1]"].rows.tolist() == [0, 1, 2]


def test_lengths_without_tokens_group_the_rows(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (WIDTH, "f32")}) as writer:
        writer.append({SITE: np.zeros((5, WIDTH), dtype=np.float32)}, lengths=[2, 3])
    store = lm.open(tmp_path / "acts")
    assert store.prompts.lengths.tolist() == [2, 3]
    assert store[f"{SITE}[-1]"].rows.tolist() == [1, 4]
    assert store.prompts[1].ids.tolist() == []


def test_prompts_without_rows_keep_their_index(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (WIDTH, "f32")}, positions="2:") as writer:
        rows = np.zeros((3, WIDTH), dtype=np.float32)
        writer.append({SITE: rows}, tokens=range(9), lengths=[2, 3, 4])
    prompts = lm.open(tmp_path / "acts").prompts
    assert [prompt.rows for prompt in prompts] == [slice(0, 0), slice(0, 1), slice(1, 3)]
    assert [prompt.positions.tolist() for prompt in prompts] == [[], [2], [2, 3]]
    assert prompts[0].ids.tolist() == [0, 1]

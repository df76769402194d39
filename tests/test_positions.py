"""Positions: parsed to one form, selected per prompt, and prompts padded into batches."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import InputError, PositionError, PromptError
from lamina.positions import (
    Positions,
    columns_of,
    make_batch,
    parse_positions,
    same_positions,
    select,
    spans,
)

SLICE = slice(None)


@pytest.mark.parametrize(
    ("value", "canonical", "text"),
    [
        (None, SLICE, ":"),
        ("all", SLICE, ":"),
        (":", SLICE, ":"),
        ("0:", SLICE, ":"),
        (slice(None, None, 1), SLICE, ":"),
        (-1, -1, "-1"),
        (np.int64(3), 3, "3"),
        ("[-1]", -1, "-1"),
        (" -1 ", -1, "-1"),
        ("+2", 2, "2"),
        ("-4:", slice(-4, None), "-4:"),
        ("[ -4 : ]", slice(-4, None), "-4:"),
        (slice(1, 9, 2), slice(1, 9, 2), "1:9:2"),
        ("1:9:2", slice(1, 9, 2), "1:9:2"),
        ("0,5", (0, 5), "0,5"),
        ("[0, -1]", (0, -1), "0,-1"),
        ([0, -1], (0, -1), "0,-1"),
        (np.array([0, -1]), (0, -1), "0,-1"),
        ([3], (3,), "3,"),
        ("3,", (3,), "3,"),
    ],
)
def test_every_spelling_has_one_canonical_form(value: Any, canonical: Any, text: str) -> None:
    positions = parse_positions(value)
    assert positions == Positions(canonical)
    assert positions.text == str(positions) == text
    assert parse_positions(text) == parse_positions(positions) == positions
    assert hash(parse_positions(text)) == hash(positions)


@pytest.mark.parametrize(
    "value", ["", "last", "1.5", "1::2:3", "0,,5", 1.5, True, [True], [0, "a"], object(), "a:b"]
)
def test_what_is_no_position_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"is no position: expected an index, a list of indices"):
        parse_positions(value)


def test_steps_are_positive_and_lists_hold_something() -> None:
    with pytest.raises(InputError, match=r"positions ::-1: the step must be positive"):
        parse_positions("::-1")
    with pytest.raises(InputError, match="an empty list; None or ':' stands for all tokens"):
        parse_positions([])


def test_positions_in_path_and_argument_must_be_equal() -> None:
    assert same_positions(None, None).is_all
    assert same_positions(-1, None) == same_positions(None, "-1") == parse_positions(-1)
    assert same_positions(slice(-4, None), "-4:") == parse_positions("-4:")
    with pytest.raises(PositionError, match=r"the paths say \[-1\] and positions= says \[0\]"):
        same_positions(-1, 0)
    with pytest.raises(PositionError, match=r"the paths say \[:\] and positions= says \[-1\]"):
        same_positions(slice(None), -1)


def test_selection_is_in_token_order_and_distinct() -> None:
    counts, chosen = select([3, 1, 4], parse_positions([-1, 0]))
    assert counts.tolist() == [2, 1, 2]
    assert chosen.tolist() == [0, 2, 0, 0, 3]
    assert counts.dtype == chosen.dtype == np.int64


def test_slices_never_raise() -> None:
    counts, chosen = select([5, 2, 1], parse_positions("1:4:2"))
    assert counts.tolist() == [2, 1, 0]
    assert chosen.tolist() == [1, 3, 1]
    assert select([2, 1], parse_positions("-4:"))[1].tolist() == [0, 1, 0]


def test_prompts_too_short_are_named() -> None:
    lengths = [9, 2, 9, 1, 9]
    with pytest.raises(PositionError) as caught:
        select(lengths, parse_positions(4), first_prompt=100)
    assert str(caught.value) == (
        "position [4] is outside 2 of 5 prompts: 101 (2 tokens) and 103 (1 token); "
        "short='drop' leaves them out"
    )
    with pytest.raises(PositionError, match=r"outside 50 of 50 prompts: 0 .*and 42 more"):
        select([1] * 50, parse_positions([0, 1]))


def test_prompts_too_short_can_be_left_out() -> None:
    counts, chosen = select([9, 2, 5], parse_positions([0, 4]), "drop")
    assert counts.tolist() == [2, 0, 2]
    assert chosen.tolist() == [0, 4, 0, 4]
    with pytest.raises(InputError, match="short='skip': expected 'error' or 'drop'"):
        select([1], parse_positions(0), "skip")  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    value=st.one_of(
        st.integers(-9, 9),
        st.lists(st.integers(-9, 9), min_size=1, max_size=4),
        st.slices(12).filter(lambda s: (s.step or 1) > 0),
    ),
)
def test_selection_is_what_a_list_of_tokens_would_give(lengths: list[int], value: Any) -> None:
    expected = []
    for length in lengths:
        tokens = list(range(length))
        if isinstance(value, slice):
            expected.append(tokens[value])
            continue
        try:
            expected.append(
                sorted({tokens[i] for i in (value if isinstance(value, list) else [value])})
            )
        except IndexError:
            expected.append([])
    counts, chosen = select(lengths, parse_positions(value), "drop")
    assert counts.tolist() == [len(each) for each in expected]
    assert chosen.tolist() == [token for each in expected for token in each]


def test_right_padding_left_padding_and_none() -> None:
    ids = [[5, 6, 7], [8]]
    right, left = make_batch(ids, "right", 9), make_batch(ids, "left", 9)
    assert right.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert left.input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert make_batch([[1, 2], [3, 4]], "none").attention_mask.tolist() == [[1, 1], [1, 1]]
    assert make_batch([np.array([4], dtype=np.uint32)], "none").input_ids.dtype == torch.int64


def test_batches_that_cannot_be_made_say_why() -> None:
    with pytest.raises(PromptError, match=r"needs prompts of one length .* have 1 and 3 tokens"):
        make_batch([[1, 2, 3], [4]], "none")
    with pytest.raises(PromptError, match="prompt 1 of the batch has no tokens"):
        make_batch([[1], []])
    with pytest.raises(PromptError, match="at least one prompt"):
        make_batch([])
    with pytest.raises(InputError, match="padding='both': expected 'right', 'left' or 'none'"):
        make_batch([[1]], "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_columns_follow_from_the_mask_for_both_sides(padding: Any) -> None:
    mask = make_batch([[1] * 12, [1] * 5], padding).attention_mask
    first = 0 if padding == "right" else 7
    assert columns_of(mask, -1).tolist() == [11, first + 4]
    assert columns_of(mask, 2).tolist() == [2, first + 2]
    with pytest.raises(PositionError, match=r"row 1 has no token 10; it has 5 tokens"):
        columns_of(mask, 10)


def test_masks_that_tell_no_prompts_are_refused() -> None:
    with pytest.raises(InputError, match=r"rows 0 of the attention mask have padding between"):
        spans(torch.tensor([[1, 0, 1], [1, 1, 0]]))
    with pytest.raises(InputError, match=r"rows 1 of the attention mask have no real token"):
        spans(torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(InputError, match=r"has shape \[1, 1, 2, 2\]; expected \[batch, sequence\]"):
        spans(torch.ones(1, 1, 2, 2))

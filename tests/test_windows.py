"""How captures are cut: every row once, in order, by lengths and options alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import PositionError
from lamina.positions import make_batch, parse_positions, spans
from lamina.windows import (
    Window,
    check_positions,
    compose,
    destinations,
    plan,
)


def windows_of(lengths: Any, positions: Any = None, **options: Any) -> list[Window]:
    chosen = {"row_bytes": 10, "batch_size": 2, "window_bytes": 80, "window_batches": 16} | options
    return list(plan(np.array(lengths, dtype=np.uint64), parse_positions(positions), **chosen))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    positions=st.sampled_from([None, "-1", "-2:", "1:6:2", "0,-1"]),
    padding=st.sampled_from(["right", "left", "none"]),
    batch_size=st.integers(1, 5),
    window_bytes=st.integers(1, 400),
)
def test_every_row_is_computed_once_and_lands_in_prompt_order(
    lengths: list[int], positions: str | None, padding: Any, batch_size: int, window_bytes: int
) -> None:
    ids = [np.arange(size) + 100 * prompt for prompt, size in enumerate(lengths)]
    rows = []
    row = token = prompt = 0
    for number, window in enumerate(
        windows_of(lengths, positions, batch_size=batch_size, window_bytes=window_bytes)
    ):
        assert (window.number, window.first_prompt, window.first_row) == (number, prompt, row)
        assert window.first_token == token
        arena = np.full(window.rows, -1)
        for members in compose(window, batch_size=batch_size, padding=padding):
            assert 1 <= len(members) <= batch_size
            batch = make_batch([ids[prompt + m] for m in members.tolist()], padding)
            batch_rows, columns, goal = destinations(window, members, padding)
            assert (arena[goal] == -1).all()
            arena[goal] = batch.input_ids.numpy()[batch_rows, columns]
            starts, sizes = (part.numpy() for part in spans(batch.attention_mask))
            assert (
                (columns >= starts[batch_rows]) & (columns < (starts + sizes)[batch_rows])
            ).all()
        rows += arena.tolist()
        row, token, prompt = row + window.rows, token + window.tokens, prompt + window.prompts
    assert prompt == len(lengths)
    expected = []
    for own in ids:
        if positions == "-1" or positions == "0,-1":
            picked = sorted({0, len(own) - 1} if positions == "0,-1" else {len(own) - 1})
            expected += [own[i] for i in picked] if len(own) else []
        else:
            expected += own[
                eval(f"slice({','.join(s or 'None' for s in positions.split(':'))})")
                if positions
                else slice(None)
            ].tolist()
    assert rows == expected


def test_a_window_holds_what_fits_but_never_less_than_one_batch() -> None:
    assert [w.prompts for w in windows_of([2, 2, 2, 2, 2, 2], window_bytes=80)] == [4, 2]
    assert [w.prompts for w in windows_of([9, 9, 9, 9, 9], window_bytes=1)] == [2, 2, 1]


def test_a_window_of_small_rows_still_ends_after_some_batches() -> None:
    windows = windows_of([1] * 100, window_bytes=1 << 40, window_batches=8)
    assert [w.prompts for w in windows] == [16] * 6 + [4]


def test_windows_do_not_depend_on_what_comes_after() -> None:
    lengths = [3, 9, 1, 4, 4, 8, 2, 2, 6, 1, 3, 5]
    whole = windows_of(lengths)
    part = windows_of(lengths[: whole[2].first_prompt])
    assert [w.prompts for w in part] == [w.prompts for w in whole[:2]]


def test_batches_hold_like_lengths_the_longest_first() -> None:
    window = windows_of([1, 7, 2, 7, 3, 1], window_bytes=1000)[0]
    batches = [members.tolist() for members in compose(window, batch_size=2, padding="right")]
    assert batches == [[1, 3], [4, 2], [0, 5]]


def test_without_padding_a_batch_has_one_length() -> None:
    window = windows_of([1, 7, 2, 7, 2, 1], window_bytes=1000)[0]
    batches = [members.tolist() for members in compose(window, batch_size=4, padding="none")]
    assert batches == [[1, 3], [2, 4], [0, 5]]


def test_prompts_without_rows_are_not_computed() -> None:
    window = windows_of([0, 3, 1, 0], "2", window_bytes=1000)[0]
    assert [m.tolist() for m in compose(window, batch_size=4, padding="right")] == [[1]]
    assert window.prompts == 4


def test_prompts_too_short_for_a_position_are_named_and_counted() -> None:
    lengths = np.array([9, 1, 0, 0, 9] + [2] * 20, dtype=np.uint64)
    check_positions(lengths, parse_positions("-9:"))
    with pytest.raises(PositionError) as caught:
        check_positions(lengths, parse_positions("4"))
    assert str(caught.value) == (
        "position [4] is outside 21 prompts of 25: 1 (1 token), 5 (2 tokens), 6 (2 tokens), "
        "7 (2 tokens), 8 (2 tokens), 9 (2 tokens), 10 (2 tokens), 11 (2 tokens) and 13 more; "
        "short='drop' leaves them out"
    )

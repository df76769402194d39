"""How a capture is cut into windows, and a window into batches.

A window is a run of consecutive prompts that is done or not done. Where windows end, and which
prompts share a batch, is a function of the prompts' lengths, the positions and recorded options,
never of the machine or of what was already captured: redoing a window gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from lamina.errors import PositionError
from lamina.positions import select
from lamina.wording import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from lamina.positions import Padding, Positions

    Integers: TypeAlias = NDArray[np.int64]

__all__ = ["Window", "check_positions", "compose", "destinations", "plan"]

PROMPTS_AT_A_TIME = 65_536
NAMED = 8


class Lengths(Protocol):
    """Tokens per prompt, read a run at a time."""

    def __len__(self) -> int:
        """Return how many prompts there are."""

    def __getitem__(self, run: slice, /) -> NDArray[np.uint64]:
        """Return the lengths of a run of prompts."""


@dataclass(frozen=True, slots=True)
class Window:
    """A run of consecutive prompts.

    Attributes:
        number: Windows before this one.
        first_prompt: Prompts before this window.
        first_row: Rows before this window.
        first_token: Tokens before this window, those without rows counted.
        lengths: Tokens per prompt.
        counts: Rows per prompt.
        positions: The position of each row in its prompt, in row order.
    """

    number: int
    first_prompt: int
    first_row: int
    first_token: int
    lengths: Integers
    counts: Integers
    positions: Integers

    @property
    def prompts(self) -> int:
        """How many prompts the window has."""
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """How many rows the window has."""
        return len(self.positions)

    @property
    def tokens(self) -> int:
        """How many tokens its prompts have together."""
        return int(self.lengths.sum())


def plan(
    lengths: Lengths,
    positions: Positions,
    *,
    row_bytes: int,
    batch_size: int,
    window_bytes: int,
    window_batches: int,
) -> Iterator[Window]:
    """Yield the windows in order.

    A window takes prompts until its rows reach `window_bytes`, but never fewer than fill one
    batch, and never more prompts than `window_batches` batches.

    Args:
        lengths: Tokens per prompt.
        positions: Which tokens of a prompt become rows; prompts that lack them have none.
        row_bytes: Bytes of one row of all sites.
        batch_size: Prompts per batch.
        window_bytes: How many bytes of rows a window may hold.
        window_batches: How many batches of prompts a window may hold.
    """
    import numpy as np

    number = prompt = row = token = 0
    most = batch_size * window_batches
    while prompt < len(lengths):
        sizes = np.asarray(lengths[prompt : prompt + most], dtype=np.int64)
        counts, flat = select(sizes, positions, "drop")
        rows = np.cumsum(counts)
        one_batch = int(np.searchsorted(np.cumsum(counts > 0), batch_size, side="left")) + 1
        fitting = int(np.searchsorted(rows * row_bytes, window_bytes, side="right"))
        stop = min(max(one_batch, fitting), len(sizes))
        taken = int(rows[stop - 1])
        yield Window(number, prompt, row, token, sizes[:stop], counts[:stop], flat[:taken])
        number += 1
        prompt += stop
        row += taken
        token += int(sizes[:stop].sum())


def compose(window: Window, *, batch_size: int, padding: Padding) -> list[Integers]:
    """Return the window's batches: prompts of like lengths together, the longest first.

    Prompts without rows are in none; with `padding="none"` a batch holds one length only.
    """
    import numpy as np

    members = np.flatnonzero(window.counts)
    order = members[np.lexsort((members, -window.lengths[members]))]
    groups = [order]
    if padding == "none" and len(order):
        changes = np.flatnonzero(np.diff(window.lengths[order])) + 1
        groups = np.split(order, changes)
    return [
        group[start : start + batch_size]
        for group in groups
        for start in range(0, len(group), batch_size)
    ]


def destinations(window: Window, members: Integers, padding: Padding) -> tuple[Integers, ...]:
    """Return where a batch's rows come from and where they go.

    Args:
        window: The window of the batch.
        members: The batch's prompts, counted in the window.
        padding: The side on which the batch is padded.

    Returns:
        The batch's row and column of each stored row, and its row in the window.
    """
    import numpy as np

    counts, lengths = window.counts[members], window.lengths[members]
    starts = (np.cumsum(window.counts) - window.counts)[members]
    before = np.cumsum(counts) - counts
    goal = np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)
    shift = lengths.max() - lengths if padding == "left" else np.zeros_like(lengths)
    columns = window.positions[goal] + np.repeat(shift, counts)
    return np.repeat(np.arange(len(members), dtype=np.int64), counts), columns, goal


def check_positions(lengths: Lengths, positions: Positions) -> None:
    """Refuse prompts that are too short for a position; skipped prompts, without tokens, are not.

    Raises:
        PositionError: Some are; the first of them are named.
    """
    import numpy as np

    if isinstance(positions.value, slice):
        return  # a slice gives what there is
    count = 0
    first: list[str] = []
    for start in range(0, len(lengths), PROMPTS_AT_A_TIME):
        sizes = np.asarray(lengths[start : start + PROMPTS_AT_A_TIME], dtype=np.int64)
        counts, _ = select(sizes, positions, "drop")
        lacking = np.flatnonzero((counts == 0) & (sizes > 0))
        count += len(lacking)
        named = lacking[: NAMED - len(first)].tolist()
        first += [f"{start + prompt} ({counted(int(sizes[prompt]), 'token')})" for prompt in named]
    if count:
        more = [f"{count - len(first):,} more"] if count > len(first) else []
        raise PositionError(
            f"position [{positions}] is outside {counted(count, 'prompt')} of {len(lengths):,}: "
            f"{listed([*first, *more])}; short='drop' leaves them out"
        )

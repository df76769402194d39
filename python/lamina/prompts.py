"""Prompts: which rows, tokens and text each has, and which row holds which token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from lamina.column import as_indices
from lamina.errors import CorruptError, InputError, PositionError
from lamina.wording import counted, listed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lamina import _core
    from lamina.column import Position, Several

__all__ = ["UNKNOWN_TOKEN", "Prompt", "Prompts", "Selection"]

UNKNOWN_TOKEN = 0xFFFF_FFFF
"""Stands on disk for the token of a row whose producer gave none."""

_GENERATED = 1  # bit 0 of a row's flags
_BLOCK = 4096  # prompts read at once while iterating


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The rows that a position selects.

    Attributes:
        rows: The store's rows, int64: `[prompts]` at one position, `[prompts, k]` for a list of
            k, `[rows]` otherwise.
        lengths: How many rows each prompt has in it, int64 `[prompts]`.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Prompt:
    """One prompt: its tokens, and which of them were stored in which rows.

    Attributes:
        index: Its number in the store: the i-th prompt given.
        rows: The rows stored of it, a slice of the store's, perhaps empty.
        length: How many tokens it has, generated ones not counted. Where the producer of the
            store gave no tokens, how many rows.
    """

    __slots__ = ("_core", "index", "length", "rows")

    index: int
    rows: slice
    length: int

    def __init__(self, core: _core.Store, index: int, rows: slice, length: int) -> None:
        self._core = core
        self.index = index
        self.rows = rows
        self.length = length

    @property
    def positions(self) -> NDArray[np.int64]:
        """The position in the prompt of each of its rows, int64."""
        return self._row_table()[1].astype(np.int64)

    @property
    def generated(self) -> NDArray[np.bool_]:
        """Which of its rows are of generated tokens."""
        return (self._row_table()[2] & _GENERATED).astype(np.bool_)

    @property
    def ids(self) -> NDArray[np.int64]:
        """All its token ids, stored or not, int64; empty where the producer gave none."""
        return np.asarray(self._core.prompt_ids(self.index)).astype(np.int64)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The same as `ids`."""
        return self.ids

    @property
    def text(self) -> str | None:
        """Its text, if the store keeps texts."""
        return self._core.prompt_text(self.index)

    def _row_table(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint8]]:
        tokens, positions, flags = self._core.row_table(self.rows.start, self.rows.stop)
        return np.asarray(tokens), np.asarray(positions), np.asarray(flags)

    def __repr__(self) -> str:
        text = self.text
        shown = "" if text is None else f", {text if len(text) <= 60 else text[:59] + '…'!r}"
        return (
            f"<Prompt {self.index}: {counted(self.length, 'token')}, "
            f"rows {self.rows.start}:{self.rows.stop}{shown}>"
        )


class Prompts(Sequence[Prompt]):
    """The prompts of a store, in the order in which they were given.

    `prompts[3]` is one, `prompts[-1]` the last, `prompts[2:5]` a list; iteration reads a few
    thousand at a time.

    >>> import lamina as lm, numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with lm.create(directory, sites={"model.wte.output": (4, "float32")}) as writer:
    ...     rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    ...     writer.append({"model.wte.output": rows}, tokens=[7, 8, 9, 5, 6], lengths=[3, 2])
    >>> prompts = lm.open(directory).prompts
    >>> prompts[1].rows, prompts[1].ids.tolist(), len(prompts)
    (slice(3, 5, None), [5, 6], 2)
    >>> prompts.rows_at([0, 1], -1).tolist()
    [2, 4]
    >>> prompts.place_of(4)
    (1, 1)
    """

    def __init__(self, core: _core.Store, stored: str | None = None) -> None:
        self._core = core
        self._stored = stored  # which positions were asked for when the store was made
        self._table: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None
        self._positions: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return self._core.prompts

    @overload
    def __getitem__(self, key: int) -> Prompt: ...
    @overload
    def __getitem__(self, key: slice) -> list[Prompt]: ...
    def __getitem__(self, key: int | slice) -> Prompt | list[Prompt]:
        """Return one prompt, or a list of them for a slice.

        Raises:
            PositionError: There are not so many prompts.
        """
        if isinstance(key, slice):
            return [self._read(index, index + 1)[0] for index in range(*key.indices(len(self)))]
        index = as_indices(key, len(self), "the prompts")
        if index.ndim:
            raise InputError("prompts are indexed by an integer or a slice")
        return self._read(int(index), int(index) + 1)[0]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), _BLOCK):
            yield from self._read(start, min(start + _BLOCK, len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each prompt has, as `Prompt.length`: int64 `[prompts]`, a copy."""
        return self._tables()[2].copy()

    @property
    def row_counts(self) -> NDArray[np.int64]:
        """How many rows were stored of each prompt: int64 `[prompts]`, a copy."""
        return self._tables()[1].copy()

    def rows_at(
        self, prompts: int | slice | Several | None, positions: int | Several
    ) -> NDArray[np.int64]:
        """Return the store's row of each prompt's token at a position, int64 `[prompts]`.

        Args:
            prompts: Which prompts: numbers, a slice or mask of them, or None for all.
            positions: One position for all of them, or one for each. Negative ones count from the
                end of the prompt: -1 is its last token, also when generated rows follow.

        Raises:
            PositionError: A prompt is too short, or that token was not stored.
        """
        numbers = self._numbers(prompts)
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.ndim and wanted.shape != numbers.shape:
            raise InputError(
                f"{counted(numbers.size, 'prompt')} and {counted(wanted.size, 'position')}: "
                "give one position for all prompts, or one for each"
            )
        rows = self._locate(numbers, wanted)
        if np.any(rows < 0):
            self._refuse(numbers, wanted, rows)
        return rows

    def place_of(
        self, rows: int | slice | Several
    ) -> tuple[int, int] | tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the prompt and the position in it that each row holds.

        Two integers for one row; two int64 arrays, of the shape given, for several.

        Raises:
            PositionError: A row lies outside the store.
        """
        wanted = as_indices(rows, self._core.rows, "the rows of the store")
        if wanted.ndim == 0:
            row = int(wanted)
            positions = np.asarray(self._core.row_table(row, row + 1)[1])
            return int(np.asarray(self._core.prompts_of(wanted.reshape(1)))[0]), int(positions[0])
        flat = np.ascontiguousarray(wanted.reshape(-1))
        prompts = np.asarray(self._core.prompts_of(flat)).astype(np.int64)
        return prompts.reshape(wanted.shape), self._positions_of(wanted)

    def select(self, position: Position, prompts: int | slice | Several | None = None) -> Selection:
        """Return the rows that a position stands for, prompt by prompt.

        Args:
            position: One, a list of them, a slice, or None for every row stored.
            prompts: Which prompts, in which order; None for all.

        Raises:
            PositionError: A prompt lacks the position, or it was not stored. Slices never raise:
                they take what is there.
        """
        numbers = self._numbers(prompts)
        if isinstance(position, int):
            return Selection(self.rows_at(numbers, position), np.ones_like(numbers))
        if isinstance(position, list):
            rows = np.stack([self.rows_at(numbers, each) for each in position], axis=1)
            return Selection(rows, np.full_like(numbers, len(position)))
        return self._run(numbers, position if position is not None else slice(None))

    def _run(self, numbers: NDArray[np.int64], wanted: slice) -> Selection:
        """Return the stored rows whose positions lie in a slice of each prompt's tokens."""
        starts, counts, lengths = self._tables_of(numbers)
        before = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(numbers.size), counts)  # which of `numbers` each row is of
        rows = np.arange(int(counts.sum()), dtype=np.int64) + (starts - before)[owner]
        if wanted == slice(None):
            return Selection(rows, counts)
        step = 1 if wanted.step is None else wanted.step
        if step <= 0:
            raise InputError(
                f"positions [{wanted.start}:{wanted.stop}:{step}]: the step must be positive "
                "(rows are in token order)"
            )
        positions = self._positions_of(rows)
        first = _bound(0 if wanted.start is None else wanted.start, lengths)[owner]
        inside = (positions >= first) & ((positions - first) % step == 0)
        if wanted.stop is not None:  # an open end takes generated tokens too
            inside &= positions < _bound(wanted.stop, lengths)[owner]
        kept = np.bincount(owner[inside], minlength=numbers.size).astype(np.int64)
        return Selection(rows[inside], kept)

    def _locate(self, numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each prompt's token, -1 where there is none."""
        absolute = np.where(wanted < 0, self._tables_of(numbers)[2] + wanted, wanted)
        rows = np.full(numbers.shape, -1, dtype=np.int64)
        inside = absolute >= 0
        found = self._core.locate(
            np.ascontiguousarray(numbers[inside]), np.ascontiguousarray(absolute[inside])
        )
        rows[inside] = np.asarray(found)
        return rows

    def _refuse(
        self, numbers: NDArray[np.int64], wanted: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> None:
        lengths = self._tables_of(numbers)[2]
        wanted = np.broadcast_to(wanted, rows.shape)
        missing = rows < 0
        short = missing & ((wanted >= lengths) | (wanted < -lengths))
        shown = listed(np.unique(wanted[short if short.any() else missing]), most=4)
        if short.any():
            who = _named(numbers[short], lengths[short])
            raise PositionError(
                f"position {shown} lies outside {who}; a slice such as [-1:] takes what is there, "
                "and its .lengths say of which prompts"
            )
        who = _named(numbers[missing])
        stored = self._stored
        if stored is None:
            first = self[int(numbers[missing][0])]
            stored = f"{listed(first.positions, most=6) or 'none'} of prompt {first.index}"
        raise PositionError(
            f"position {shown} of {who} was not stored; the stored positions are {stored}"
        )

    def _numbers(self, prompts: int | slice | Several | None) -> NDArray[np.int64]:
        if prompts is None:
            return np.arange(len(self), dtype=np.int64)
        return np.atleast_1d(as_indices(prompts, len(self), "the prompts"))

    def _positions_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions that rows hold in their prompts; the table is read once."""
        if self._positions is None:
            try:
                self._positions = np.asarray(self._core.row_table(0, self._core.rows)[1])
            except CorruptError:
                each = {at: self._core.row_table(at, at + 1)[1] for at in np.unique(rows).tolist()}
                found = [np.asarray(each[at]).item() for at in rows.reshape(-1).tolist()]
                return np.array(found, dtype=np.int64).reshape(rows.shape)
        return self._positions[rows].astype(np.int64)

    def _read(self, start: int, stop: int) -> list[Prompt]:
        starts, counts, lengths = _effective(self._core.prompt_table(start, stop))
        return [
            Prompt(self._core, start + at, slice(first, first + count), length)
            for at, (first, count, length) in enumerate(
                zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True)
            )
        ]

    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return first row, number of rows and length of every prompt, read once."""
        if self._table is None:
            self._table = _effective(self._core.prompt_table(0, len(self)))
        return self._table

    def _tables_of(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the same of some prompts; damage elsewhere does not stand in their way."""
        try:
            starts, counts, lengths = self._tables()
        except CorruptError:
            if numbers.size == 0:
                raise
            each = {at: self._core.prompt_table(at, at + 1) for at in np.unique(numbers).tolist()}
            rows = [[np.asarray(part)[0] for part in each[at]] for at in numbers.tolist()]
            starts, counts, lengths = _effective(np.array(rows, dtype=np.uint64).T)
            return starts, counts, lengths
        return starts[numbers], counts[numbers], lengths[numbers]

    def __repr__(self) -> str:
        return f"<Prompts: {counted(len(self), 'prompt')}, {counted(self._core.rows, 'row')}>"


def _effective(
    table: Iterable[_core.Tensor | NDArray[np.uint64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the columns of a prompt table; a prompt without ids is as long as its rows."""
    starts, counts, lengths = (np.asarray(column).astype(np.int64) for column in table)
    return starts, counts, np.where(lengths == 0, counts, lengths)


def _bound(value: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an end of a slice in each prompt, counted from its first token."""
    return np.maximum(lengths + value, 0) if value < 0 else np.full_like(lengths, value)


def _named(numbers: NDArray[np.int64], lengths: NDArray[np.int64] | None = None) -> str:
    """Return `prompt 3`, or `prompts 3 (1 token) and 9 (2 tokens)`."""
    texts = [str(number) for number in numbers.tolist()]
    if lengths is not None:
        counts = [counted(length, "token") for length in lengths.tolist()]
        texts = [f"{text} ({count})" for text, count in zip(texts, counts, strict=True)]
    return f"prompt{'s' if len(texts) != 1 else ''} {listed(texts)}"

"""The windows of a capture, computed one after another and written behind.

Whatever ends it early (a model that raises, Ctrl-C, an error of the disk), windows that were whole
are committed if the writer still can, and the error says what is there and how to go on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamina.errors import CastOverflowError, CorruptError
from lamina.positions import make_batch
from lamina.recorder import Recorder
from lamina.ring import Arena, Ring, cast
from lamina.windows import Window, compose, destinations, plan
from lamina.wording import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lamina import _core
    from lamina.options import Options
    from lamina.positions import Positions
    from lamina.progress import Progress
    from lamina.sites import Resolved
    from lamina.spool import Spool

__all__ = ["Work", "compute"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a capture has to do.

    Attributes:
        model: The model, as the caller gave it.
        resolved: The sites.
        dtypes: Per site, the stored dtype.
        positions: Which tokens become rows.
        options: How rows are cut and batched.
        spool: The prompts.
        pad_id: What fills padding.
    """

    model: object
    resolved: Resolved
    dtypes: tuple[torch.dtype, ...]
    positions: Positions
    options: Options
    spool: Spool
    pad_id: int

    @property
    def row_bytes(self) -> list[int]:
        """Per site, the bytes of one stored row."""
        sizes = []
        for site, dtype in zip(self.resolved.sites, self.dtypes, strict=True):
            size = dtype.itemsize
            for length in site.shape:
                size *= length
            sizes.append(size)
        return sizes

    def windows(self) -> Iterator[Window]:
        """Yield the windows, from the first."""
        return plan(
            self.spool,
            self.positions,
            row_bytes=sum(self.row_bytes),
            batch_size=self.options.batch_size,
            window_bytes=self.options.window_bytes,
            window_batches=self.options.window_batches,
        )


@dataclass(frozen=True, slots=True)
class _Tables:
    """What stands beside a window's rows."""

    tokens: NDArray[np.uint32]
    positions: NDArray[np.uint32]
    flags: NDArray[np.uint8]
    prompt_rows: NDArray[np.uint64]
    prompt_lengths: NDArray[np.uint64]
    prompt_ids: NDArray[np.uint32]
    texts: list[str] | None


def compute(work: Work, writer: _core.Writer, rows_total: int, progress: Progress) -> None:
    """Compute every window that the writer has not committed, and hand all of them over.

    Args:
        work: What to do.
        writer: Begun or resumed, with whole windows only.
        rows_total: Rows of the whole capture.
        progress: Told of every batch.

    Raises:
        CastOverflowError: A cast made finite values infinite, and the options refuse that.
        CorruptError: The committed windows do not end where these would.
    """
    row_bytes = sum(work.row_bytes)
    filled: dict[int, Window] = {}

    def overflowed(arena: Arena, site: int, rows: NDArray[np.int64]) -> None:
        raise _overflow_error(work, filled[id(arena)], site, rows)

    windows = _remaining(work, writer)
    first = next(windows, None)
    if first is None:
        return
    progress.start(
        total=work.spool.summary.tokens,
        total_bytes=rows_total * row_bytes,
        done=first.first_token,
        done_bytes=first.first_row * row_bytes,
    )
    check = overflowed if work.options.overflow == "error" else None
    ring: Ring[_Tables] = Ring(
        work.row_bytes, lambda arena, tables: _append(writer, arena, tables), overflowed=check
    )
    with ring, Recorder(work.model, work.resolved) as recorder:
        try:
            window: Window | None = first
            while window is not None:
                arena = ring.open(window.rows)
                filled[id(arena)] = window
                ids = work.spool.ids(window.first_token, window.first_token + window.tokens)
                _compute_window(work, window, ids, recorder, ring, arena, progress)
                ring.submit(arena, _tables(work, window, ids))
                window = next(windows, None)
            ring.drain()
        except BaseException as error:
            _commit_whole(ring, writer, rows_total, error)
            raise


def _remaining(work: Work, writer: _core.Writer) -> Iterator[Window]:
    """Yield the windows that are not committed."""
    done = writer.windows
    number = prompts = rows = 0
    for window in work.windows():
        number = window.number
        if number == done:
            _check_start(writer, window.first_prompt, window.first_row)
        if number >= done:
            yield window
        prompts, rows = window.first_prompt + window.prompts, window.first_row + window.rows
    if number < done:
        _check_start(writer, prompts, rows)


def _check_start(writer: _core.Writer, prompts: int, rows: int) -> None:
    if (writer.prompts, writer.rows) != (prompts, rows):
        raise CorruptError(
            f"{writer.directory}: {counted(writer.windows, 'window')} of the store end at prompt "
            f"{writer.prompts:,}, row {writer.rows:,}; with its options they end at prompt "
            f"{prompts:,}, row {rows:,}"
        )


def _compute_window(
    work: Work,
    window: Window,
    ids: NDArray[np.uint32],
    recorder: Recorder,
    ring: Ring[_Tables],
    arena: Arena,
    progress: Progress,
) -> None:
    import numpy as np
    import torch

    padding: Any = work.options.padding
    ends = np.cumsum(window.lengths)
    row_bytes = sum(work.row_bytes)
    for members in compose(window, batch_size=work.options.batch_size, padding=padding):
        starts = ends[members] - window.lengths[members]
        prompts = [
            ids[a:b].astype(np.int64)
            for a, b in zip(starts.tolist(), ends[members].tolist(), strict=True)
        ]
        rows, columns, goal = destinations(window, members, padding)

        def sink(site: int, values: torch.Tensor, goal: NDArray[np.int64] = goal) -> None:
            stored, counts = cast(values, work.dtypes[site])
            ring.put(arena, site, stored, goal, counts)

        try:
            recorder.run(
                make_batch(prompts, padding, work.pad_id),
                torch.from_numpy(rows),
                torch.from_numpy(columns),
                sink,
            )
        except Exception as error:
            numbers = np.sort(members) + window.first_prompt
            error.add_note(f"while computing prompts {_runs(numbers.tolist())}")
            raise
        progress.advance(int(window.lengths[members].sum()), len(goal) * row_bytes)


def _tables(work: Work, window: Window, ids: NDArray[np.uint32]) -> _Tables:
    import numpy as np

    starts = np.cumsum(window.lengths) - window.lengths
    return _Tables(
        tokens=ids[np.repeat(starts, window.counts) + window.positions],
        positions=window.positions.astype(np.uint32),
        flags=np.zeros(window.rows, dtype=np.uint8),
        prompt_rows=window.counts.astype(np.uint64),
        prompt_lengths=window.lengths.astype(np.uint64),
        prompt_ids=ids,
        texts=work.spool.texts(window.first_prompt, window.first_prompt + window.prompts),
    )


def _append(writer: _core.Writer, arena: Arena, tables: _Tables) -> None:
    writer.append(
        arena.columns,
        tokens=tables.tokens,
        positions=tables.positions,
        flags=tables.flags,
        prompt_rows=tables.prompt_rows,
        prompt_lengths=tables.prompt_lengths,
        prompt_ids=tables.prompt_ids,
        texts=tables.texts,
        overflow=arena.overflow,
    )


def _commit_whole(
    ring: Ring[Any], writer: _core.Writer, rows_total: int, error: BaseException
) -> None:
    """Commit the windows that are whole, and say in the error's notes what is there."""
    try:
        with suppress(Exception):
            ring.drain()
        ring.end()
        writer.commit()
    except BaseException as second:
        error.add_note(f"windows that were not committed yet are lost: {second}")
    else:
        error.add_note(
            f"{writer.rows:,} of {rows_total:,} rows are committed in {writer.directory}; the same "
            f"capture, run again, goes on from there"
        )


def _overflow_error(
    work: Work, window: Window, site: int, rows: NDArray[np.int64]
) -> CastOverflowError:
    import numpy as np

    prompts = np.searchsorted(np.cumsum(window.counts), rows, side="right") + window.first_prompt
    stored = str(work.dtypes[site]).removeprefix("torch.")
    computed = str(work.resolved.sites[site].dtype).removeprefix("torch.")
    return CastOverflowError(
        f"`{work.resolved.sites[site]}` has {computed} values that {stored} cannot hold, in "
        f"prompts {_runs(np.unique(prompts).tolist())}; store it as bfloat16 or float32, or pass "
        f"overflow='report' to keep infinities and count them"
    )


def _runs(numbers: list[int]) -> str:
    """Return numbers as text, runs of consecutive ones as `4 to 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts: list[object] = []
    for first, last in runs:
        texts += [f"{first} to {last}"] if last > first + 1 else range(first, last + 1)
    return listed(texts)

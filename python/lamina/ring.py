"""From the model to the writer: rows leave the device, take their places, and are written behind.

Two threads work while the model runs. One waits until a slot's copy from the device has arrived and
puts its rows into the window's arena, in prompt order; the other hands whole windows over. There
are a fixed number of slots and arenas: when none is free, the model waits, and nothing piles up. An
error in either thread is raised in the capturing thread by the next call here.

On CUDA a slot is pinned memory, filled by a stream of its own and read only after the copy's event.
On the CPU a slot holds the tensor itself. Everything else is the same code.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    import numpy as np
    import torch
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]
    Overflow: TypeAlias = tuple[int, int, int]

__all__ = ["ARENAS", "SLOTS", "Arena", "Ring", "cast"]

ARENAS = 2
"""Windows in memory: one being filled, one being written."""

SLOTS = 4
"""Batches of one site on their way from the device."""

Payload = TypeVar("Payload")


class Arena:
    """One window's rows, site after site, each in prompt order.

    Attributes:
        columns: Per site the window's rows as bytes.
        overflow: Site, row of the window, and number of values that a cast made infinite.
    """

    def __init__(self, row_bytes: Sequence[int]) -> None:
        self._row_bytes = row_bytes
        self._buffer: Bytes | None = None
        self.columns: list[Bytes] = []
        self.overflow: list[Overflow] = []

    def prepare(self, rows: int) -> None:
        """Make room for a window; what was in the arena is gone."""
        import numpy as np

        needed = rows * sum(self._row_bytes)
        self.columns, self.overflow = [], []
        if self._buffer is None or len(self._buffer) < needed:
            self._buffer = None  # before the larger one is made, so that both never exist
            self._buffer = np.empty(needed, dtype=np.uint8)
        start = 0
        for size in self._row_bytes:
            self.columns.append(self._buffer[start : start + rows * size])
            start += rows * size

    def place(self, site: int, values: Bytes, goal: NDArray[np.int64]) -> None:
        """Put rows of a site into their places."""
        record = f"V{self._row_bytes[site]}"
        self.columns[site].view(record)[goal] = values.view(record)


@dataclass(slots=True)
class _Slot:
    """Rows of one site of one batch, on their way into an arena."""

    host: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    event: torch.cuda.Event | None = None
    pinned: torch.Tensor | None = None

    def stage(
        self, values: torch.Tensor, counts: torch.Tensor | None, streams: dict[Any, Any]
    ) -> None:
        """Begin to bring rows to the host; on CUDA this returns before they are there."""
        if values.device.type != "cuda":
            self.host = values.detach().cpu().contiguous()
            self.counts = None if counts is None else counts.cpu()
            return
        import torch

        stream = streams.get(values.device)
        if stream is None:
            stream = streams[values.device] = torch.cuda.Stream(values.device)
        values = values.detach().contiguous()
        tail = -(-values.nbytes // 8) * 8
        needed = tail + (0 if counts is None else counts.nbytes)
        if self.pinned is None or self.pinned.nbytes < needed:
            self.pinned = None
            self.pinned = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        self.host = self.pinned[: values.nbytes].view(values.dtype).view(values.shape)
        self.counts = None if counts is None else self.pinned[tail:needed].view(counts.dtype)
        # The copy starts when the values are computed, and the allocator gives their memory to
        # nobody else before the copy is done.
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            self.host.copy_(values, non_blocking=True)
            values.record_stream(stream)
            if counts is not None and self.counts is not None:
                self.counts.copy_(counts, non_blocking=True)
                counts.record_stream(stream)
            self.event = stream.record_event()

    def arrived(self) -> torch.Tensor:
        """Wait for the rows and return them."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        assert self.host is not None
        return self.host

    def empty(self) -> None:
        """Let go of what the slot held; pinned memory is kept for the next use."""
        self.host = self.counts = self.event = None


@dataclass(frozen=True, slots=True)
class _Rows(Generic[Payload]):
    """What the placing thread is given: a slot to place, or the end of a window."""

    arena: Arena
    slot: _Slot | None = None
    site: int = 0
    goal: NDArray[np.int64] | None = None
    payload: Payload | None = None


@dataclass(slots=True)
class _State(Generic[Payload]):
    """What the three threads share, all of it under one condition."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    arenas: deque[Arena] = field(default_factory=deque)
    slots: deque[_Slot] = field(default_factory=deque)
    to_place: deque[_Rows[Payload]] = field(default_factory=deque)
    to_write: deque[tuple[Arena, Payload]] = field(default_factory=deque)
    unwritten: int = 0
    error: BaseException | None = None
    ended: bool = False


class Ring(Generic[Payload]):
    """Arenas, slots and the two threads behind the model.

    Args:
        row_bytes: Per site, the bytes of one stored row.
        write: Takes a whole window: its arena and what `submit` was given. Runs in a thread.
        overflowed: If given, is told of an arena, a site and the rows in which a cast overflowed;
            what it raises ends the capture.
        arenas: How many windows may be in memory.
        slots: How many batches of one site may be on their way.
    """

    def __init__(
        self,
        row_bytes: Sequence[int],
        write: Callable[[Arena, Payload], None],
        *,
        overflowed: Callable[[Arena, int, NDArray[np.int64]], None] | None = None,
        arenas: int = ARENAS,
        slots: int = SLOTS,
    ) -> None:
        self._state: _State[Payload] = _State()
        self._state.arenas.extend(Arena(row_bytes) for _ in range(arenas))
        self._state.slots.extend(_Slot() for _ in range(slots))
        self._write = write
        self._overflowed = overflowed
        self._streams: dict[Any, Any] = {}
        self._threads = [
            threading.Thread(target=self._place_all, name="lamina-place", daemon=True),
            threading.Thread(target=self._write_all, name="lamina-write", daemon=True),
        ]

    def __enter__(self) -> Self:
        """Start the threads."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the threads."""
        self.end()

    def end(self) -> None:
        """End the threads once each has done what it is at; what they have not begun is dropped."""
        with self._state.changed:
            self._state.ended = True
            self._state.changed.notify_all()
        for thread in self._threads:
            thread.join()

    def open(self, rows: int) -> Arena:
        """Return an arena for a window, once one is free."""
        arena: Arena = self._take(self._state.arenas)
        arena.prepare(rows)
        return arena

    def put(
        self,
        arena: Arena,
        site: int,
        values: torch.Tensor,
        goal: NDArray[np.int64],
        counts: torch.Tensor | None = None,
    ) -> None:
        """Send rows of a site on their way, once a slot is free.

        Args:
            arena: The window's arena.
            site: The site's number.
            values: `[n, *feature]`, in the stored dtype, not written to by anybody afterwards.
            goal: Each row's place in the window.
            counts: Per row, how many values a cast made infinite.
        """
        slot = self._take(self._state.slots)
        slot.stage(values, counts, self._streams)
        self._give(self._state.to_place, _Rows(arena, slot, site, goal))

    def submit(self, arena: Arena, payload: Payload) -> None:
        """Hand over a window all of whose rows were put."""
        state, end = self._state, _Rows(arena, payload=payload)
        with state.changed:
            self._raise()
            # Counted and queued with no call between, where Ctrl-C could come: `drain` would wait
            # for a window that nobody has.
            state.unwritten += 1
            state.to_place.append(end)
            state.changed.notify_all()

    def drain(self) -> None:
        """Wait until every window that was handed over has been written."""
        with self._state.changed:
            self._state.changed.wait_for(lambda: self._state.error or not self._state.unwritten)
            self._raise()

    def _take(self, free: deque[Any]) -> Any:  # noqa: ANN401
        with self._state.changed:
            self._state.changed.wait_for(lambda: self._state.error or free)
            self._raise()
            return free.popleft()

    def _give(self, queue: deque[Any], item: object) -> None:
        with self._state.changed:
            self._raise()
            queue.append(item)
            self._state.changed.notify_all()

    def _raise(self) -> None:
        if self._state.error is not None:
            raise self._state.error

    def _next(self, queue: deque[Any]) -> Any:  # noqa: ANN401
        """Return the next item of a queue once there is one, or None when the ring has ended."""
        state = self._state
        with state.changed:
            state.changed.wait_for(lambda: state.error or state.ended or queue)
            return None if state.error or state.ended else queue.popleft()

    def _place_all(self) -> None:
        _step_back()
        try:
            while (rows := self._next(self._state.to_place)) is not None:
                self._place(rows)
        except BaseException as error:
            self._fail(error)

    def _place(self, rows: _Rows[Payload]) -> None:
        import torch

        state = self._state
        if rows.slot is None or rows.goal is None:
            rows.arena.overflow.sort()
            with state.changed:
                state.to_write.append((rows.arena, rows.payload))  # type: ignore[arg-type]
                state.changed.notify_all()
            return
        host = rows.slot.arrived()
        rows.arena.place(rows.site, host.view(-1).view(torch.uint8).numpy(), rows.goal)
        if rows.slot.counts is not None:
            self._count(rows, rows.slot.counts)
        rows.slot.empty()
        del host
        with state.changed:
            state.slots.append(rows.slot)
            state.changed.notify_all()

    def _count(self, rows: _Rows[Payload], counts: torch.Tensor) -> None:
        assert rows.goal is not None
        places = counts.nonzero().flatten().numpy()
        if not len(places):
            return
        goal = rows.goal[places]
        numbers = counts.numpy()[places].tolist()
        rows.arena.overflow.extend(
            (rows.site, row, number) for row, number in zip(goal.tolist(), numbers, strict=True)
        )
        if self._overflowed is not None:
            self._overflowed(rows.arena, rows.site, goal)

    def _write_all(self) -> None:
        _step_back()
        state = self._state
        try:
            while (item := self._next(state.to_write)) is not None:
                arena, payload = item
                self._write(arena, payload)
                del item, payload
                with state.changed:
                    state.arenas.append(arena)
                    state.unwritten -= 1
                    state.changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._state.changed:
            if self._state.error is None:
                self._state.error = error
            self._state.changed.notify_all()


def cast(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return values in the stored dtype, and per row how many finite ones it could not hold.

    They become infinite; in eight bits NaN or the largest value, as torch's version has it.
    Runs on the values' own device. The counts are None where the cast cannot overflow, or where
    (on the CPU, where looking is cheap) it did not.

    Args:
        values: `[n, *feature]`, floating point.
        dtype: The stored dtype, floating point.
    """
    import torch

    if values.dtype == dtype:
        return values, None
    stored = values.to(dtype)
    most, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    if torch.finfo(values.dtype).max <= most or not values.numel():
        return stored, None
    if values.device.type == "cpu":
        least, largest = (float(bound) for bound in torch.aminmax(values))
        if -most <= least and largest <= most:
            return stored, None
    rounds_to_most = most + step * 2.0 ** math.floor(math.log2(most)) / 2
    lost = ~torch.isfinite(stored.float()) | (values.abs() > rounds_to_most)
    lost &= torch.isfinite(values)
    return stored, lost.reshape(len(lost), -1).sum(dim=1, dtype=torch.int32)


def _step_back() -> None:
    """Let the model's threads go first: all of them wait for one that loses its core to this."""
    with suppress(OSError):
        # On Linux a thread has a priority of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

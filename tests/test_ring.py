"""The ring behind the model: order, bounds, back-pressure, and errors of its threads."""

import contextlib
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from lamina.ring import Arena, Ring, cast

WAIT = 10.0


class Sink:
    """Keeps what the ring writes; can be held, and can fail."""

    def __init__(self) -> None:
        self.windows: list[tuple[Any, list[np.ndarray], list[tuple[int, int, int]]]] = []
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def __call__(self, arena: Arena, payload: Any) -> None:
        assert self.open.wait(WAIT)
        if self.error is not None:
            raise self.error
        self.windows.append((payload, [c.copy() for c in arena.columns], list(arena.overflow)))


def wide(rows: Any) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.float32)[:, None].repeat(1, 2)


def hand_over(ring: Ring[Any], arena: Arena) -> None:
    ring.submit(arena, None)
    ring.drain()


def test_rows_take_their_places_whatever_order_they_come_in() -> None:
    sink = Sink()
    generator = np.random.default_rng(0)
    with Ring([8, 1], sink) as ring:
        for window in range(6):
            arena = ring.open(10)
            order = generator.permutation(10)
            for part in (order[:3], order[3:4], order[4:]):
                ring.put(arena, 0, wide(part + 100 * window), part)
                ring.put(arena, 1, torch.from_numpy(part).to(torch.uint8), part)
            ring.submit(arena, window)
        ring.drain()
    assert [payload for payload, _, _ in sink.windows] == list(range(6))
    for window, columns, overflow in sink.windows:
        expected = wide(np.arange(10) + 100 * window).numpy()
        assert np.array_equal(columns[0].view(np.float32).reshape(10, 2), expected)
        assert columns[1].tolist() == list(range(10))
        assert overflow == []


def test_windows_of_different_sizes_share_the_arenas() -> None:
    sink = Sink()
    with Ring([4], sink) as ring:
        for rows in (1, 50, 0, 7, 51):
            arena = ring.open(rows)
            goal = np.arange(rows)
            if rows:
                ring.put(arena, 0, torch.arange(rows, dtype=torch.float32), goal)
            ring.submit(arena, rows)
        ring.drain()
    for rows, (column,), _ in sink.windows:
        assert column.view(np.float32).tolist() == list(range(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_every_dtype_travels_as_its_bytes(dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(4, 3).to(dtype)
    sink = Sink()
    with Ring([3 * values.element_size()], sink) as ring:
        arena = ring.open(4)
        ring.put(arena, 0, values, np.array([3, 1, 0, 2]))
        ring.submit(arena, None)
        ring.drain()
    stored = torch.from_numpy(sink.windows[0][1][0]).view(dtype).reshape(4, 3)
    assert torch.equal(stored[[3, 1, 0, 2]].float(), values.float())


def test_a_slow_writer_makes_the_model_wait() -> None:
    sink = Sink()
    sink.open.clear()
    opened = []

    def run(ring: Ring[int]) -> None:
        for window in range(4):
            arena = ring.open(2)
            opened.append(window)
            ring.put(arena, 0, wide([0, 1]), np.arange(2))
            ring.submit(arena, window)

    with Ring([8], sink, arenas=2) as ring:
        model = threading.Thread(target=run, args=(ring,))
        model.start()
        time.sleep(0.2)
        assert opened == [0, 1]  # one window is being written, one waits: no third arena
        sink.open.set()
        model.join(WAIT)
        ring.drain()
    assert [payload for payload, _, _ in sink.windows] == [0, 1, 2, 3]


def test_the_model_goes_on_while_a_window_is_written() -> None:
    sink = Sink()
    sink.open.clear()
    with Ring([8], sink, arenas=2) as ring:
        ring.submit(ring.open(0), "first")
        arena = ring.open(400)
        for row in range(400):  # many more than there are slots
            ring.put(arena, 0, wide([row]), np.array([row]))
        ring.submit(arena, "second")
        assert sink.windows == []
        sink.open.set()
        ring.drain()
    assert sink.windows[1][1][0].view(np.float32).reshape(400, 2)[:, 0].tolist() == list(range(400))


def test_an_error_of_the_writer_is_raised_in_the_capturing_thread() -> None:
    sink = Sink()
    sink.error = OSError(28, "No space left on device")
    with Ring([8], sink) as ring:
        arena = ring.open(1)
        ring.put(arena, 0, wide([1]), np.arange(1))
        with pytest.raises(OSError, match="No space left"):
            hand_over(ring, arena)
        with pytest.raises(OSError, match="No space left"):
            ring.open(1)


def test_an_error_wakes_a_model_that_waits_for_room() -> None:
    sink = Sink()
    sink.open.clear()
    sink.error = RuntimeError("disk gone")
    with Ring([8], sink, arenas=1) as ring:
        ring.submit(ring.open(0), 0)
        threading.Timer(0.1, sink.open.set).start()
        with pytest.raises(RuntimeError, match="disk gone"):
            ring.open(1)


def test_an_error_while_placing_rows_is_raised_in_the_capturing_thread() -> None:
    with Ring([8], Sink()) as ring:
        arena = ring.open(2)
        ring.put(arena, 0, wide([1]), np.array([7]))  # no such row
        with pytest.raises(IndexError):
            hand_over(ring, arena)


def test_leaving_ends_the_threads_with_work_undone() -> None:
    before = threading.active_count()
    with Ring([8], Sink()) as ring:
        ring.put(ring.open(1), 0, wide([1]), np.arange(1))
    assert threading.active_count() == before


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU, to go the way of those that are."""

    device = property(lambda _: torch.device("cuda", 0))  # type: ignore[assignment]
    recorded: list[Any] = []  # noqa: RUF012

    def record_stream(self, stream: Any) -> None:  # type: ignore[override]
        self.recorded.append(stream)


class Stream:
    """Counts what is asked of a CUDA stream; its events say so when they are waited for."""

    def __init__(self, _: object) -> None:
        self.asked: list[str] = []

    def wait_stream(self, _: object) -> None:
        self.asked.append("wait")

    def record_event(self) -> "Stream":
        self.asked.append("event")
        return self

    def synchronize(self) -> None:
        self.asked.append("synchronize")


def test_the_way_of_a_gpu_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned slots, their second use, the counts behind the rows: `test_cuda` runs the real one."""
    made: list[int] = []
    empty = torch.empty

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    sink = Sink()
    with Ring([6], sink, slots=1) as ring:
        arena = ring.open(9)
        for goal in (np.array([2, 0, 1]), np.array([4, 3]), np.array([5, 8, 6, 7])):
            values = torch.as_tensor(goal).to(torch.float16)[:, None].repeat(1, 3)
            counts = torch.as_tensor(goal % 2).to(torch.int32)
            ring.put(arena, 0, values.as_subclass(OnDevice), goal, counts.as_subclass(OnDevice))
        ring.submit(arena, None)
        ring.drain()
        (stream,) = ring._streams.values()
    (_, (column,), overflow) = sink.windows[0]
    assert column.view(np.float16).reshape(9, 3)[:, 0].tolist() == list(range(9))
    assert overflow == [(0, row, 1) for row in (1, 3, 5, 7)]
    assert made == [24 + 12, 24 + 16]  # grown once, used again for the smaller batch
    assert stream.asked == ["wait", "event", "synchronize"] * 3
    assert len(OnDevice.recorded) == 6


def test_overflow_is_counted_by_site_and_row_of_the_window() -> None:
    told = []
    sink = Sink()
    values = torch.tensor([[1.0, 1e6], [2.0, 3.0], [-1e6, 1e7]])
    with Ring(
        [4, 4], sink, overflowed=lambda _, site, rows: told.append((site, rows.tolist()))
    ) as ring:
        arena = ring.open(3)
        for site in (1, 0):
            stored, counts = cast(values * (site + 1), torch.float16)
            ring.put(arena, site, stored, np.array([2, 1, 0]), counts)
        ring.submit(arena, None)
        ring.drain()
    assert sink.windows[0][2] == [(0, 0, 2), (0, 2, 1), (1, 0, 2), (1, 2, 1)]
    assert told == [(1, [2, 0]), (0, [2, 0])]


def test_a_cast_counts_only_what_it_made_infinite() -> None:
    values = torch.tensor([[float("inf"), 1.0], [float("nan"), -65504.0], [65519.0, 65520.0]])
    stored, counts = cast(values, torch.float16)
    assert counts is not None
    assert counts.tolist() == [0, 0, 1]
    assert torch.equal(stored, values.half()) or torch.isnan(stored[1, 0])


def test_a_cast_to_eight_bits_counts_what_these_cannot_hold() -> None:
    stored, counts = cast(torch.tensor([464.0, 500.0, -1000.0]), torch.float8_e4m3fn)
    assert counts is not None
    assert counts.tolist() == [0, 1, 1]
    assert stored.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("goal", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_overflow_is_seen_from_every_wider_dtype(source: torch.dtype, goal: torch.dtype) -> None:
    stored, counts = cast(torch.tensor([[1.0, 1e5], [2.0, 3.0]], dtype=source), goal)
    assert counts is not None
    assert counts.tolist() == [1, 0]
    assert stored.dtype == goal


@pytest.mark.parametrize(
    ("source", "goal"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_a_cast_that_loses_nothing_counts_nothing(source: torch.dtype, goal: torch.dtype) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(source)
    stored, counts = cast(values, goal)
    assert counts is None
    assert torch.equal(stored, values.to(goal))

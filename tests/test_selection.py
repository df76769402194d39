"""Positions against an oracle of plain loops: any lengths, anything stored, anything asked."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import lamina as lm
from lamina.positions import parse_positions, select

SITE = "model.h[0].output"
INDICES = some.integers(-5, 5)
BOUNDS = some.none() | some.integers(-6, 6)
SLICES = some.builds(slice, BOUNDS, BOUNDS, some.none() | some.integers(1, 3))
POSITIONS = INDICES | some.lists(INDICES, min_size=1, max_size=4) | SLICES
LENGTHS = some.lists(some.integers(1, 6), min_size=1, max_size=6)


def text_of(position: int | list[int] | slice) -> str:
    if isinstance(position, int):
        return f"[{position}]"
    if isinstance(position, list):
        return f"[{', '.join(map(str, position))},]"
    parts = ("" if part is None else str(part) for part in (position.start, position.stop))
    return f"[{':'.join(parts)}{'' if position.step is None else f':{position.step}'}]"


def wanted_of(position: int | list[int] | slice, length: int) -> list[int | None]:
    """Return the absolute positions that are meant, None where the prompt lacks one."""
    if isinstance(position, slice):
        return list(range(length)[position])
    several = [position] if isinstance(position, int) else position
    return [range(length)[at] if -length <= at < length else None for at in several]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, stored=some.just(slice(None)) | POSITIONS, asked=POSITIONS)
def test_a_column_holds_the_rows_that_loops_find(lengths, stored, asked):
    try:
        counts, flat = select(lengths, parse_positions(stored))
    except lm.PositionError:
        counts, flat = select(lengths, parse_positions(stored), "drop")
        lengths = [n for n, count in zip(lengths, counts, strict=True) if count]
        counts = counts[counts > 0]
    if not lengths:
        return
    owners = np.repeat(np.arange(len(lengths)), counts)
    places = list(zip(owners.tolist(), flat.tolist(), strict=True))
    row_of = {place: row for row, place in enumerate(places)}
    expected = [
        [row_of.get((prompt, at)) for at in wanted_of(asked, length)]
        for prompt, length in enumerate(lengths)
    ]
    with tempfile.TemporaryDirectory() as directory:
        acts = Path(directory) / "acts"
        with lm.create(acts, sites={SITE: ((), "int64")}, positions=stored) as writer:
            writer.append({SITE: np.arange(len(flat))}, tokens=range(sum(lengths)), lengths=lengths)
        store = lm.open(acts)
        if isinstance(asked, slice):
            kept = [[row for row in rows if row is not None] for rows in expected]
            column = store[SITE + text_of(asked)]
            assert column.numpy().tolist() == [row for rows in kept for row in rows]
            assert column.lengths.tolist() == [len(rows) for rows in kept]
        elif any(row is None for rows in expected for row in rows):
            with pytest.raises(lm.PositionError, match=r"lies outside|was not stored"):
                store[SITE + text_of(asked)]
        else:
            found = store[SITE + text_of(asked)].numpy().tolist()
            assert found == ([rows[0] for rows in expected] if isinstance(asked, int) else expected)
        assert [store.prompts.place_of(row) for row in range(store.rows)] == places
        with suppress(lm.PositionError):
            assert store.load(SITE + text_of(asked)).keys()


@settings(max_examples=20, deadline=None)
@given(
    appends=some.lists(LENGTHS, min_size=1, max_size=5),
    commits=some.sets(some.integers(0, 4)),
    shard_bytes=some.sampled_from([64, 256, 1 << 20]),
)
def test_rows_come_back_in_order_however_they_were_appended(appends, commits, shard_bytes):
    total = sum(map(sum, appends))
    values = np.arange(total * 2, dtype=np.float32).reshape(total, 2)
    with tempfile.TemporaryDirectory() as directory:
        acts = Path(directory) / "acts"
        row = 0
        with lm.create(acts, sites={SITE: (2, "f32")}, shard_bytes=shard_bytes) as writer:
            for number, lengths in enumerate(appends):
                part = slice(row, row + sum(lengths))
                writer.append({SITE: values[part]}, tokens=range(sum(lengths)), lengths=lengths)
                row = part.stop
                if number in commits:
                    writer.commit()
                    reader = lm.open(acts)
                    assert np.array_equal(reader[SITE].numpy(), values[:row])
                    assert reader.verify().intact
        store = lm.open(acts)
        lengths = [length for each in appends for length in each]
        assert np.array_equal(store[SITE].numpy(), values)
        assert store.prompts.lengths.tolist() == lengths
        assert store[f"{SITE}[-1]"].rows.tolist() == (np.cumsum(lengths) - 1).tolist()
        order = np.random.default_rng(0).permutation(total)
        assert np.array_equal(store.gather(SITE, order)[:, 0].numpy(), values[order])
        assert store.verify().intact

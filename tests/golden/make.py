"""Makes the golden stores of `v1`: `python tests/golden/make.py DIRECTORY`.

They were made once, when the format was, and are read by every later version of lamina. A change
of the format gets a folder of its own; these stay as they are.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

import lamina as lm
from lamina import _core

DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
]
SHAPES: list[tuple[int, ...]] = [(3,), (), (2, 2)]
"""The shapes of a row of the sites of `dtypes`, taken in turn."""

TINY = "model.h[0].output"


def values(site: int, first: int, rows: int, nbytes: int, dtype: str) -> np.ndarray:
    """Return the bytes of rows `first..` of a site: byte i of a column is this function of i."""
    at = np.arange(first * nbytes, (first + rows) * nbytes)
    data = (at * 7 + at // 5 + site * 13).astype(np.uint8)
    return data & 1 if dtype == "bool" else data


class Feeder:
    """Appends windows of prompts to a core writer, with made-up numbers."""

    def __init__(self, directory: Path, sites: list[Any], **options: Any) -> None:
        self.directory, self.sites = directory, sites
        self.texts = bool(options.get("texts"))
        self.rows = self.prompts = 0
        self.core = _core.Writer(directory)
        options = {"identity": '{"golden":1}', "about": "{}", "rows_total": None} | options
        self.core.begin(sites, **options)

    def reopen(self) -> None:
        """Continue the store with a new writer."""
        self.core = _core.Writer(self.directory)
        self.core.resume(rows_total=None)

    def window(self, lengths: list[int], last: int | None = None, generated: int = 0) -> None:
        """Append prompts of these lengths; rows of the last `last` tokens of each, or of all.

        The last `generated` rows of the window are flagged as generated.
        """
        kept = [length if last is None else min(length, last) for length in lengths]
        ids = [np.arange(length, dtype=np.uint32) + 100 * (self.prompts + at)
               for at, length in enumerate(lengths)]  # fmt: skip
        positions = [np.arange(length - keep, length, dtype=np.uint32)
                     for length, keep in zip(lengths, kept, strict=True)]  # fmt: skip
        tokens = [every[where] for every, where in zip(ids, positions, strict=True)]
        rows = sum(kept)
        flags = np.zeros(rows, dtype=np.uint8)
        flags[rows - generated :] = 1
        columns = [
            values(at, self.rows, rows, math.prod(shape) * _core.dtype_size(dtype), dtype)
            for at, (_, dtype, shape) in enumerate(self.sites)
        ]
        self.core.append(
            columns,
            tokens=np.concatenate(tokens),
            positions=np.concatenate(positions),
            flags=flags,
            prompt_rows=np.array(kept, dtype=np.uint64),
            prompt_lengths=np.array(lengths, dtype=np.uint64),
            prompt_ids=np.concatenate(ids),
            texts=[text(self.prompts + at) for at in range(len(lengths))] if self.texts else None,
        )
        self.rows += rows
        self.prompts += len(lengths)


def text(prompt: int) -> str:
    """Return a prompt's text: every third is empty, every other has more bytes than letters."""
    return "" if prompt % 3 == 2 else f"prompt {prompt}" + " Größe ✓" * (prompt % 2)


def tiny(directory: Path) -> None:
    """One site, three rows, two prompts: the example of docs/format.md."""
    rows = np.array([[1.0, 1.5], [2.0, -2.5], [3.0, 0.0]], dtype=np.float32)
    with lm.create(directory, {TINY: (2, "float32")}, identity={"run": 1}) as writer:
        writer.append({TINY: rows}, tokens=[5, 6, 7], lengths=[1, 2])


def dtypes(directory: Path) -> None:
    """Every dtype; rows of no, one and two dimensions; a name that JSON has to escape."""
    sites = [
        (f"model.{name}.output", name, SHAPES[at % len(SHAPES)]) for at, name in enumerate(DTYPES)
    ]
    sites.append(('model.blöcke."a\\b".output', "uint8", (1,)))
    feeder = Feeder(directory, sites)
    feeder.window([2, 3])
    feeder.core.finish()


def prompts(directory: Path) -> None:
    """Full shards of four rows; prompts over one border and over two, some without rows; texts."""
    sites = [("model.a.output", "bfloat16", (3,)), ("model.b.output", "int16", ())]
    feeder = Feeder(directory, sites, shard_bytes=4 * (8 + 9), texts=True)
    feeder.window([0, 3, 0, 2])
    feeder.window([1, 2, 0])  # ends at the border of a shard: the last opens the next one
    feeder.window([10, 0, 1], generated=1)
    feeder.window([0, 0])
    feeder.core.finish()


def pieces(directory: Path) -> None:
    """A store that is not complete: a full shard, then two pieces; only some positions stored."""
    sites = [("model.a.output", "float16", (2,))]
    feeder = Feeder(directory, sites, shard_bytes=8 * (4 + 9))
    feeder.window([6, 1, 9], last=4)
    feeder.window([3], last=4)
    feeder.core.commit()
    feeder.window([5, 0], last=4)
    feeder.core.commit()
    feeder.core.close()


STORES = {"tiny": tiny, "dtypes": dtypes, "prompts": prompts, "pieces": pieces}


def main(target: Path) -> None:
    """Make every golden store under `target`, which must not exist."""
    target.mkdir(parents=True)
    for name, make in STORES.items():
        make(target / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

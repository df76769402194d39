"""Small stores made of known numbers, for the tests of the store side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import lamina as lm

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = [3, 1, 4]
IDS = [11, 12, 13, 21, 31, 32, 33, 34]
SITES = [f"model.layers[{layer}].output" for layer in (0, 1, 2, 10)]
WIDTH = 6


def numbers(rows: int = 8, sites: int = len(SITES), width: int = WIDTH) -> np.ndarray:
    """Return `[site, rows, width]` float32 values that are all different."""
    count = sites * rows * width
    return np.arange(count, dtype=np.float32).reshape(sites, rows, width) / 8


def make(directory: Path, **options: Any) -> lm.Store:
    """Make a store of four sites and three prompts, and open it."""
    values = numbers()
    sites = dict.fromkeys(SITES, (WIDTH, "float32"))
    with lm.create(directory, sites=sites, **options) as writer:
        columns = {site: values[at] for at, site in enumerate(SITES)}
        texts = ["a b c", "d", "e f g h"] if options.get("texts") else None
        writer.append(columns, tokens=IDS, lengths=LENGTHS, texts=texts)
    return lm.open(directory)

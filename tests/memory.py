"""Small stores written through the core, and a look at what is mapped of them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina import _core

SITE = "model.layers[0].output"


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _core.dtype_size(dtype) * int(np.prod(shape, dtype=np.int64))


def pattern(dtype: str, shape: tuple[int, ...], rows: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes `[rows, bytes of a row]` of arbitrary finite values."""
    generator = np.random.default_rng(seed)
    high = 2 if dtype == "bool" else 60  # no exponent of ones: neither NaN nor infinity
    return generator.integers(0, high, (rows, row_bytes(dtype, shape)), dtype=np.uint8)


def write_store(
    directory: Path,
    columns: Mapping[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]],
    *,
    window_rows: int = 100,
    shard_bytes: int = 1 << 30,
    finish: bool = True,
) -> _core.Store:
    """Write columns (dtype, feature shape, bytes per row) in windows, each row a prompt."""
    writer = _core.Writer(str(directory))
    sites = [(path, dtype, shape) for path, (dtype, shape, _) in columns.items()]
    writer.begin(sites, identity="{}", about="{}", rows_total=None, shard_bytes=shard_bytes)
    rows = len(next(iter(columns.values()))[2])
    for start in range(0, rows, window_rows):
        count = min(window_rows, rows - start)
        writer.append(
            [values[start : start + count] for _, _, values in columns.values()],
            tokens=np.arange(start, start + count, dtype=np.uint32),
            positions=np.zeros(count, np.uint32),
            flags=np.zeros(count, np.uint8),
            prompt_rows=np.ones(count, np.uint64),
            prompt_lengths=np.ones(count, np.uint64),
            prompt_ids=np.arange(start, start + count, dtype=np.uint32),
        )
        if not finish:
            writer.commit()
    if finish:
        writer.finish()
    else:
        writer.commit()
        writer.close()
    return _core.Store.open(str(directory))


def digests(directory: Path) -> dict[str, str]:
    """What every file of a store holds, by name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def writable_mappings(directory: Path) -> int:
    """How many private writable mappings this process has of the store's files."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(" rw-p " in line and f"{directory}/" in line for line in lines)

"""Append-write with fsync: a `Writer` against np.memmap + fsync and raw write + fsync.

All three write the same rows from memory, window by window, and end durable. lamina's also have
their checksums, tables, header, content-derived name and manifest. Goals: at least 1.3 times as
fast as np.memmap, at least 0.95 times as fast as raw writes.
"""

import os
import shutil
import statistics
from pathlib import Path

import numpy as np

import lamina as lm
from measure import arguments, compare, place, ratios, show, timed

SITES, WIDTH, WINDOW = 12, 768, 4096


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    rows_total = 65_536 if options.full else 32_768
    generator = np.random.default_rng(0)
    windows = [  # a few windows over and over: what is written is never what was written last
        [
            generator.standard_normal((WINDOW, WIDTH), dtype=np.float32).astype(np.float16)
            for _ in range(SITES)
        ]
        for _ in range(4)
    ]
    tokens, lengths = np.arange(WINDOW, dtype=np.int64), [128] * (WINDOW // 128)
    names = [f"model.layers[{layer}].output" for layer in range(SITES)]
    turns = [windows[turn % len(windows)] for turn in range(rows_total // WINDOW)]

    def with_lamina(folder: Path) -> None:
        sites = dict.fromkeys(names, (WIDTH, "float16"))
        with lm.create(folder / "acts", sites=sites, identity={"bench": "write"}) as writer:
            for columns in turns:
                writer.append(
                    dict(zip(names, columns, strict=True)), tokens=tokens, lengths=lengths
                )

    def with_memmap(folder: Path) -> None:
        shape = (rows_total, WIDTH)
        maps = [np.memmap(folder / f"{i}.bin", np.float16, "w+", shape=shape) for i in range(SITES)]
        for turn, columns in enumerate(turns):
            for target, column in zip(maps, columns, strict=True):
                target[turn * WINDOW : (turn + 1) * WINDOW] = column
        for i, target in enumerate(maps):
            target.flush()
            synced(folder / f"{i}.bin")

    def with_write(folder: Path) -> None:
        with (folder / "raw.bin").open("wb", buffering=0) as file:
            for columns in turns:
                for column in columns:
                    write_all(file.fileno(), memoryview(column).cast("B"))
            os.fsync(file.fileno())

    with place(options.directory) as folder:
        cases = {}
        for name, write in {
            "lamina": with_lamina,
            "np.memmap + fsync": with_memmap,
            "raw write + fsync": with_write,
        }.items():
            cases[name] = on_fresh(folder / name.split()[0], write)
        seconds = compare(cases, options.rounds or (9 if options.full else 5))

    size = rows_total * SITES * WIDTH * 2
    show(
        "Append-write with fsync",
        ["", "s", "GB/s", "best GB/s", "lamina is faster by"],
        [
            [
                name,
                f"{statistics.median(taken):.2f}",
                f"{size / statistics.median(taken) / 1e9:.2f}",
                f"{size / min(taken) / 1e9:.2f}",
                "" if name == "lamina" else f"{ratios(seconds, 'lamina', name):.2f}×",
            ]
            for name, taken in seconds.items()
        ],
        f"{SITES} sites × {rows_total:,} rows × {WIDTH} float16 = {size / 1e9:.2f} GB, "
        f"medians of {len(seconds['lamina'])} rounds. Goals ≥ 1.3× and ≥ 0.95×.",
    )


def on_fresh(folder: Path, write):  # noqa: ANN001, ANN201 - a case of measure.py
    """Return a case that writes into an empty folder and removes it uncounted."""

    def case() -> float:
        folder.mkdir()
        os.sync()
        taken = timed(lambda: write(folder))()
        shutil.rmtree(folder)
        return taken

    return case


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`, as write(2) may take less."""
    while data:
        data = data[os.write(descriptor, data) :]


def synced(path: Path) -> None:
    """Make a file durable."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    main()

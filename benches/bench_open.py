"""Open a store and read one row, anew each time, against safetensors.safe_open of one file.

Goal: below 3 ms with 10,000 sites.
"""

import statistics
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import lamina as lm
from measure import arguments, compare, place, ratios, show, timed

ROWS, WIDTH = 64, 32


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    rounds = options.rounds or (51 if options.full else 21)
    rows = []
    with place(options.directory) as folder:
        for count in (100, 1_000, 10_000):
            names = [f"model.layers[{i // 10}].part{i % 10}.output" for i in range(count)]
            values = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
            store, file = folder / f"acts{count}", folder / f"{count}.safetensors"
            sites = dict.fromkeys(names, (WIDTH, "float32"))
            with lm.create(store, sites=sites, identity={"bench": "open"}) as writer:
                writer.append(dict.fromkeys(names, values))
            save_file(dict.fromkeys(names, values), file)
            seconds = compare(
                {
                    "lamina": timed(partial(lamina_row, store, names[count // 2])),
                    "safetensors": timed(partial(safetensors_row, file, names[count // 2])),
                },
                rounds,
            )
            medians = [f"{statistics.median(taken) * 1e3:.2f}" for taken in seconds.values()]
            rows.append(
                [f"{count:,}", *medians, f"{ratios(seconds, 'lamina', 'safetensors'):.1f}×"]
            )
    show(
        "Open and read the first row",
        ["sites", "lamina ms", "safe_open ms", "lamina is faster by"],
        rows,
        f"Warm cache, medians of {rounds} rounds. Goal < 3 ms at 10,000.",
    )


def lamina_row(directory: Path, name: str) -> np.ndarray:
    """Open, take one row."""
    return np.asarray(lm.open(directory)[name][0])


def safetensors_row(file: Path, name: str) -> np.ndarray:
    """Open, take one row."""
    with safe_open(file, framework="np") as tensors:
        return tensors.get_slice(name)[0:1]


if __name__ == "__main__":
    main()

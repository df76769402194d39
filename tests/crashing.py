"""Captures in processes of their own, killed at chosen or random moments; run by `test_crash`.

One process loads the model once and forks a child for every attempt, so that an attempt costs
what the capture costs. The children are killed with SIGKILL: nothing of theirs runs afterwards.

    python crashing.py DIRECTORY SEED random|POINT[:COUNT]
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tests.models import llama
from tests.recording import prompts_of

import lamina as lm
from lamina import _core

SITES = "model.layers[:].output"
PROMPTS = [ids.tolist() for ids in prompts_of([5, 1, 12, 7, 7, 3, 20, 2, 9, 1, 16, 40] * 3)]
# Windows of one to three batches; a full shard holds 32 rows; a commit after every window.
OPTIONS: dict[str, Any] = {
    "batch_size": 1, "window_bytes": 5000, "shard_bytes": 1 << 14, "commit_seconds": 0.0
}  # fmt: skip
MOST_ATTEMPTS = 400
MOST_CAPTURES = 12
INTERRUPTED, EARLY = 130, 131  # how a child ends after Ctrl-C: in the windows, or before them

POINTS: dict[str, tuple[str, str, str]] = {
    # Where the child kills itself: the module, its function, and before or after the call.
    "spooling": ("lamina.spool", "_Pass.add", "after"),
    "spooled": ("lamina.capture", "write_spool", "after"),
    "locked": ("lamina.capture", "_write", "before"),
    "begun": ("lamina.capture", "compute", "before"),
    "forward": ("lamina.computing", "make_batch", "after"),
    "appending": ("lamina.computing", "_append", "before"),
    "appended": ("lamina.computing", "_append", "after"),
    "computed": ("lamina.capture", "compute", "after"),
    "finished": ("lamina.capture", "_opened", "before"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(point: str, count: int) -> None:
    """Make this process kill itself at the `count`-th passing of a point."""
    module, name, when = POINTS[point]
    owner = import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inner = getattr(owner, name)
    passed = [0]

    def trap(*args: Any, **kwargs: Any) -> Any:
        passed[0] += 1
        if when == "before" and passed[0] == count:
            die()
        result = inner(*args, **kwargs)
        if when == "after" and passed[0] == count:
            die()
        return result

    setattr(owner, name, trap)


def attempt(
    directory: Path,
    prepare: Callable[[], None],
    seconds: float | None,
    number: signal.Signals = signal.SIGKILL,
) -> int:
    """Capture in a child, sent a signal after some time if asked; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            lm.capture(MODEL, PROMPTS, SITES, to=directory, **OPTIONS)
            os._exit(0)
        except KeyboardInterrupt as error:
            notes = getattr(error, "__notes__", [])
            os._exit(INTERRUPTED if any("goes on from there" in n for n in notes) else EARLY)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, number)
    return os.waitpid(child, 0)[1]


def check(directory: Path, whole: lm.Store) -> str:
    """Return what is wrong with the store that a kill left, or an empty text."""
    if _core.probe(str(directory)) != "store":
        return ""
    store = lm.open(directory)
    if not store.verify():
        return f"version {store.version} is damaged"
    for site in store.sites:
        if not torch.equal(store[site].tensor, whole[site].tensor[: store.rows]):
            return f"version {store.version} has other rows at {site}"
    return ""


def named_shards(directory: Path) -> dict[str, bytes]:
    shards = _core.Store.open(str(directory)).shards
    return {s[0]: (directory / "shards" / s[0]).read_bytes() for s in shards}


def main(directory: Path, seed: int, plan: str) -> dict[str, Any]:
    """Run one plan to its end; return what happened."""
    generator = random.Random(seed)
    begun = time.perf_counter()
    whole = lm.capture(MODEL, PROMPTS, SITES, to=directory / "whole", **OPTIONS)
    duration = time.perf_counter() - begun
    expected = named_shards(directory / "whole")
    killed = attempts = 0
    problems: list[str] = []
    versions: list[int] = []
    interrupted: list[bool] = []

    def one(to: Path, prepare: Callable[[], None], seconds: float | None, **how: Any) -> bool:
        nonlocal killed, attempts
        attempts += 1
        status = attempt(to, prepare, seconds, **how)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
        killed += os.WIFSIGNALED(status) or code in (INTERRUPTED, EARLY)
        interrupted.append(code == INTERRUPTED)
        if code not in (0, INTERRUPTED, EARLY):
            problems.append(f"attempt {attempts} exited with {code}")
        if problem := check(to, whole):
            problems.append(problem)
        if _core.probe(str(to)) == "store":
            versions.append(lm.open(to).version)
        return os.WIFEXITED(status) and code == 0

    def compare(to: Path) -> None:
        if named_shards(to) != expected:
            problems.append("the finished shards differ from those of an uninterrupted run")
        if not lm.open(to).complete:
            problems.append("not complete")
        if (to / "spool").exists() or list(to.rglob("*.part")):
            problems.append("something is left over")

    if plan == "random":
        for _ in range(MOST_CAPTURES):  # on a fast machine many kills come too late
            if killed >= 8 and len(set(versions)) > 5:
                break
            to = directory / "killed"
            shutil.rmtree(to, ignore_errors=True)
            for _ in range(MOST_ATTEMPTS):
                if one(to, lambda: None, generator.uniform(0, duration)) or problems:
                    break
            compare(to)
    elif plan == "ctrl-c":
        OPTIONS["commit_seconds"] = 1e9  # what is committed then is what the interrupt committed
        for _ in range(MOST_CAPTURES):
            if any(interrupted):
                break
            to = directory / "interrupted"
            shutil.rmtree(to, ignore_errors=True)
            for _ in range(MOST_ATTEMPTS):
                seconds = generator.uniform(0, 2 * duration)
                if one(to, lambda: None, seconds, number=signal.SIGINT) or problems:
                    break
            compare(to)
    else:
        point, _, count = plan.partition(":")
        to = directory / plan.replace(":", "-")
        for _ in range(int(count or 1) + 1):  # twice at the first counts: also in a resumed run
            one(to, lambda: set_trap(point, int(count or 1)), None)
        if _core.probe(str(to)) != "store" or not lm.open(to).complete:
            one(to, lambda: None, None)
        compare(to)
    return {
        "attempts": attempts, "killed": killed, "problems": problems, "versions": versions,
        "interrupted": sum(interrupted),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODEL = llama()
    plans = sys.argv[3].split(",")
    print(
        json.dumps(
            {p: main(Path(sys.argv[1]) / str(n), int(sys.argv[2]), p) for n, p in enumerate(plans)}
        )
    )

"""What the benchmarks share: fair rounds, the machine, a table."""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Case", "arguments", "compare", "machine", "place", "ratios", "show"]

Case = Callable[[], float]  # runs once and returns the seconds that count


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="larger inputs, more rounds")
    parser.add_argument("--rounds", type=int, help="how often each case runs")
    parser.add_argument(
        "--directory", type=Path, default=Path("target/bench"), help="where to write"
    )
    return parser.parse_args()


def machine() -> str:
    """Return one line about what this runs on."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


@contextmanager
def place(directory: Path) -> Iterator[Path]:
    """Give a fresh folder on the disk to be measured, and remove it."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=directory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Run the cases in turn, `rounds` times over: what changes meanwhile meets them all.

    The order turns by one each round, and one round before the first is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = cases[name]()
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(action: Callable[[], object]) -> Case:
    """Return a case that counts all that `action` takes."""

    def case() -> float:
        begun = time.perf_counter()
        action()
        return time.perf_counter() - begun

    return case


def ratios(seconds: dict[str, list[float]], name: str, baseline: str) -> float:
    """Return the median over rounds of baseline time over time: above 1 is faster."""
    pairs = zip(seconds[baseline], seconds[name], strict=True)
    return statistics.median(base / own for base, own in pairs)


def show(title: str, header: list[str], rows: list[list[str]], note: str = "") -> None:
    """Print a table that stands in a document as it is."""
    print(f"\n### {title}\n{machine()}. {note}\n".replace(". \n", ".\n"))
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            + " |"
        )
    print(flush=True)

"""SIGKILL of a real capture: every version it leaves is whole, and it ends with the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(directory: Path, plans: str, seed: int = 0) -> Any:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.crashing", str(directory), str(seed), plans],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_killed_at_random_moments_it_ends_with_the_same_files(tmp_path: Path) -> None:
    report = run(tmp_path, "random")["random"]
    assert report["problems"] == []
    assert report["killed"] >= 5, report
    assert len(set(report["versions"])) > 5, report


def test_ctrl_c_at_random_moments_loses_nothing_that_is_whole(tmp_path: Path) -> None:
    report = run(tmp_path, "ctrl-c", seed=1)["ctrl-c"]
    assert report["problems"] == []
    assert report["interrupted"] >= 1, report


@pytest.mark.parametrize(
    "points",
    [
        ["spooling:1", "spooled:1", "locked:1", "begun:1", "computed:1", "finished:1"],
        ["forward:1", "forward:3", "forward:17", "appending:1", "appended:1", "appended:4"],
    ],
    ids=["around the windows", "within the windows"],
)
def test_killed_at_chosen_points_it_ends_with_the_same_files(
    tmp_path: Path, points: list[str]
) -> None:
    for point, report in run(tmp_path, ",".join(points)).items():
        assert report["problems"] == [], point
        assert report["killed"] >= 1, point

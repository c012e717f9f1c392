"""The wall clock may jump, and files may be of any time: nothing that is made depends on either."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import lives
import pytest
from killed_works import SETTINGS, WEIGHTS, in_full

import deqlib
import viar

Times = Callable[[int, int], int]
Tally = Callable[..., None]
WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.today", "datetime.utcnow", "date.today")
TIMES_OF_FILES = ("st_mtime", "st_mtime_ns", "st_ctime", "st_atime", "getmtime", "getctime", "getatime")


def jumping(seed: int, *arguments: str) -> None:
    """The command `viar` with a wall clock that jumps by hours and years, back and forth, at every look."""
    import random
    import time

    draw, real = random.Random(seed), time.time

    def now() -> float:
        return real() + draw.choice([-1, 1]) * draw.choice([3600.0, 86400.0, 3e7, 3e8])

    time.time, time.time_ns = now, lambda: int(now() * 1e9)
    lives.viar(*arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return lives.save_pair(tmp_path_factory.mktemp("models"))


def commands(pair: tuple[str, ...]) -> dict[str, list[str]]:
    # A budget of time that is far from used up, and states that are far from due.
    budget = ["--train.steps", "8", "--train.seconds", "3000", "--train.save-every", "2000"]
    return {
        "generate": ["generate", *pair, "--num", "20", "--batch-size", "4"],
        "tokenize": ["tokenize", *pair[2:], "--data", "digits", "--shard-size", "500"],
        "train": ["train", "digits-viar", *pair[2:], "--train.batch-size", "4", *budget],
    }


@pytest.mark.parametrize("command", ["generate", "tokenize", pytest.param("train", marks=in_full)])
def test_a_wall_clock_that_jumps_changes_nothing(
    command: str, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    arguments, told = commands(pair)[command], tmp_path / "told"
    assert lives.begin(lives.viar, *arguments, "--out", str(tmp_path / "whole"), told=told).ended() == 0
    kept = (WEIGHTS, SETTINGS, "metrics.jsonl") if command == "train" else None
    expected, wrong, unclear = lives.contents(tmp_path / "whole"), 0, 0
    for seed in range(runs := times(1, 10)):
        out = tmp_path / str(seed)
        unclear += lives.begin(jumping, seed, *arguments, "--out", str(out), told=told).ended() != 0
        found = lives.contents(out)
        wrong += any(found[name] != expected[name] for name in kept or expected) or set(found) != set(
            expected
        )
    what = f"the clock jumps by hours and years: `viar {command}`"
    tally("faults", what, runs=runs, lost=0, wrong=wrong, unclear=unclear)


@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_files_of_the_future_and_of_the_past_are_taken_as_others(
    command: str, pair: tuple[str, ...], tmp_path: Path, tally: Tally
) -> None:
    arguments, out = [*commands(pair)[command], "--out", str(tmp_path / "out")], tmp_path / "out"
    assert lives.begin(lives.viar, *arguments, told=tmp_path / "told").ended() == 0
    whole, wrong = lives.contents(out), 0
    files = [path for path in sorted(out.iterdir()) if path.suffix in (".png", ".npy", ".sha256")]
    kept = [path for path in files if int(path.stem.rpartition("-")[2]) % 3]  # others are to be made again
    moments = (0, 4_000_000_000)  # 1970 and 2096
    for moment in moments:
        for path in files:
            if path in kept:
                os.utime(path, (moment, moment))
            else:
                path.unlink()
        assert lives.begin(lives.viar, *arguments, told=tmp_path / "told").ended() == 0
        wrong += lives.contents(out) != whole
        wrong += any(path.stat().st_mtime != moment for path in kept)
    what = f"files are of 1970 and of 2096: `viar {command}` goes on"
    tally("faults", what, runs=len(moments), lost=0, wrong=wrong, unclear=0)


def test_no_wall_clock_and_no_time_of_a_file_is_looked_at() -> None:
    found = []
    for package in (deqlib, viar):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                if text.endswith(WALL_CLOCKS) or text.rpartition(".")[2] in TIMES_OF_FILES:
                    found.append(f"{path.name}: {text}")
    assert found == []

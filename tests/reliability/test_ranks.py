"""One of several processes dies or stands still: the others end, and the work goes on to the same."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import lives
import pytest
from killed_works import SETTINGS, TRAINING, WEIGHTS, in_full

Times = Callable[[int, int], int]
Tally = Callable[..., None]
BOUND = 60.0  # seconds within which those that are left have ended
PATIENCE = 6.0  # seconds that they wait for one that stands still, here
WORLD = 2


def impatient(*arguments: str) -> None:
    """The command `viar` among processes that wait for `PATIENCE` in place of PyTorch's half an hour."""
    from datetime import timedelta
    from functools import partial

    import torch.distributed as dist

    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", timeout=patience)
    dist.new_group = partial(dist.new_group, timeout=patience)
    lives.viar(*arguments)


def together(arguments: list[str], told: Path, work: Callable[..., None] = lives.viar) -> list[lives.Life]:
    return [
        lives.begin(work, *arguments, told=told, environment=environment)
        for environment in lives.environments(WORLD)
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return lives.save_pair(tmp_path_factory.mktemp("models"))


def training(pair: tuple[str, ...], steps: int, out: Path) -> list[str]:
    return ["train", "digits-viar", *pair[2:], *TRAINING, "--train.steps", str(steps), "--out", str(out)]


def series(pair: tuple[str, ...], out: Path) -> list[str]:
    return ["generate", *pair, "--num", "120", "--batch-size", "2", "--out", str(out)]


def whole(arguments: list[str], folder: Path) -> dict[str, bytes]:
    """What processes that are left alone write."""
    assert not any(life.ended() for life in together(arguments, folder.with_suffix(".txt")))
    return lives.contents(folder)


def disturbed(
    arguments: list[str], begun: Path, number: signal.Signals, run: int, work: Callable[..., None]
) -> tuple[bool, bool]:
    """After one process got a signal: whether what was there is lost, and what the other says unclear."""
    folder, draw = begun.parent, random.Random(run)
    told = folder.with_suffix(".txt")
    processes = together(arguments, told, work)
    assert processes[0].until(begun.exists)
    time.sleep(draw.uniform(0, 0.2))
    struck = processes[run % WORLD]
    struck.send(number)
    left = processes[1 - run % WORLD]
    code = left.ended(BOUND)
    if number == signal.SIGSTOP:
        struck.process.kill()
    struck.process.join()
    said = told.read_text()
    clear = code == 2 and "another process of this work" in said and "Traceback" not in said
    return not begun.exists(), code != 0 and not clear


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=in_full)])
def test_training_of_which_a_process_is_lost_ends_and_goes_on_to_the_same_weights(
    number: signal.Signals, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    expected = whole(training(pair, 8, tmp_path / "whole"), tmp_path / "whole")
    lost = wrong = unclear = 0
    for run in range(runs := times(1, 2)):
        arguments = training(pair, 8, tmp_path / str(run))
        begun = tmp_path / str(run) / "state"
        work = impatient if number == signal.SIGSTOP else lives.viar
        is_lost, is_unclear = disturbed(arguments, begun, number, run, work)
        lost, unclear = lost + is_lost, unclear + is_unclear
        wrong += any(life.ended() for life in together(arguments, tmp_path / "again.txt"))
        found = lives.contents(tmp_path / str(run))
        wrong += any(found[name] != expected[name] for name in (WEIGHTS, SETTINGS, "metrics.jsonl"))
    what = "is killed" if number == signal.SIGKILL else "stands still"
    row = f"one of two processes {what}: `viar train`"
    tally("faults", row, runs=runs, lost=lost, wrong=wrong, unclear=unclear)


def test_a_series_of_which_a_process_is_killed_ends_and_goes_on_to_the_same_files(
    pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    expected = whole(series(pair, tmp_path / "whole"), tmp_path / "whole")
    lost = wrong = unclear = 0
    for run in range(runs := times(1, 5)):
        out = tmp_path / str(run)
        is_lost, is_unclear = disturbed(
            series(pair, out), out / "000001.png", signal.SIGKILL, run, lives.viar
        )
        lost, unclear = lost + is_lost, unclear + is_unclear
        wrong += any(life.ended() for life in together(series(pair, out), tmp_path / "again.txt"))
        wrong += lives.contents(out) != expected
    row = "one of two processes is killed: `viar generate --num`"
    tally("faults", row, runs=runs, lost=lost, wrong=wrong, unclear=unclear)

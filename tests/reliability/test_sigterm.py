"""SIGTERM: training saves its state and ends well, all else ends in one line; each goes on to the same."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import lives
import pytest
from killed_works import SETTINGS, WEIGHTS, Work, converted, edited, in_full, picture, series, tokens
from PIL import Image

Times = Callable[[int, int], int]
Tally = Callable[..., None]
LEFTOVERS = (".partial", ".saving", ".lock", ".new", ".old")
ENDED = (143, -signal.SIGTERM)  # told, and before or after the command itself is at work
KEPT = (WEIGHTS, SETTINGS, "metrics.jsonl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return lives.save_pair(tmp_path_factory.mktemp("models"))


def training(command: str, pair: tuple[str, ...], steps: int, out: Path) -> list[str]:
    recipe = ("digits",) if command == "train-tokenizer" else ("digits-viar", *pair[2:])
    flags = ("--train.batch-size", "4", "--train.seconds", "None", "--train.steps", str(steps))
    return [command, *recipe, *flags, "--out", str(out)]


def begun(arguments: list[str], told: Path, num_processes: int) -> list[lives.Life]:
    """Processes of one command."""
    if num_processes == 1:
        return [lives.begin(lives.viar, *arguments, told=told)]
    return [
        lives.begin(lives.viar, *arguments, told=told, environment=environment)
        for environment in lives.environments(num_processes)
    ]


def has_stepped(out: Path) -> Callable[[], bool]:
    log = out / "metrics.jsonl"
    return lambda: log.exists() and bool(log.read_text())


def asked_to_end(
    command: str, pair: tuple[str, ...], folder: Path, asked: tuple[int, ...], num_processes: int, seed: int
) -> tuple[int, int, int, float]:
    """Lost, wrong, unclear, and seconds to its end, of a training of which processes get SIGTERM: `asked`."""
    folder.mkdir()
    steps, told, out = 20, folder / "told.txt", folder / "out"
    flags = training(command, pair, steps, out)
    processes = begun(flags, told, num_processes)
    assert processes[0].until(has_stepped(out))
    time.sleep(random.Random(seed).uniform(0, 0.3))
    for index in asked:
        processes[index].send(signal.SIGTERM)
    sent = time.monotonic()
    codes = [process.ended(lives.LIMIT) for process in processes]
    seconds = time.monotonic() - sent
    said = told.read_text()
    is_done = (out / WEIGHTS).exists() and not (out / "state").exists()
    lost = not is_done and not (out / "state" / "state.pt").exists()
    unclear = "Traceback" in said or (not is_done and "ended by SIGTERM after step" not in said)
    wrong = any(codes)
    if not is_done:
        wrong += any(process.ended() for process in begun(flags, told, num_processes))
        assert "goes on after step" in told.read_text()
    return lost, wrong, unclear, seconds


@pytest.mark.parametrize(
    ("command", "asked", "num_processes"),
    [
        ("train", (0,), 1),
        pytest.param("train-tokenizer", (0,), 1, marks=in_full),
        pytest.param("train", (0,), 2, marks=in_full),
        pytest.param("train", (1,), 2, marks=in_full),
        pytest.param("train", (0, 1), 2, marks=in_full),
    ],
)
def test_training_saves_its_state_ends_well_and_goes_on_bit_for_bit(
    command: str,
    asked: tuple[int, ...],
    num_processes: int,
    pair: tuple[str, ...],
    tmp_path: Path,
    times: Times,
    tally: Tally,
) -> None:
    whole = training(command, pair, 20, tmp_path / "whole")
    assert not any(life.ended() for life in begun(whole, tmp_path / "whole.txt", num_processes))
    expected, figures, slowest = lives.contents(tmp_path / "whole"), [0, 0, 0], 0.0
    for run in range(runs := times(1, 2)):
        folder = tmp_path / str(run)
        *found, seconds = asked_to_end(command, pair, folder, asked, num_processes, run)
        ended, slowest = lives.contents(folder / "out"), max(slowest, seconds)
        found[1] += any(ended[name] != expected[name] for name in KEPT)
        figures = [a + b for a, b in zip(figures, found, strict=True)]
    lost, wrong, unclear = figures
    whom = {(0,): "the main one", (1,): "the other one", (0, 1): "both"}[asked]
    where = "" if num_processes == 1 else f" in two processes, to {whom}"
    what = f"`viar {command}`{where}"
    tally("faults", f"SIGTERM: {what}", runs=runs, lost=lost, wrong=wrong, unclear=unclear)
    tally("ends", what, times=runs, slowest=round(slowest, 1))


def ended(work: Work, folder: Path, runs: int) -> tuple[dict[str, int], float]:
    """Figures of a command that gets SIGTERM while it writes, and is started again until it is done.

    With the most seconds that it took to end.
    """
    draw, told = random.Random(0), folder / "told.txt"
    whole, parts = folder / "whole", folder / "parts"
    for place in (whole, parts):
        place.mkdir()
    start = time.monotonic()
    assert lives.begin(lives.viar, *work.arguments(whole), told=told).ended() == 0
    took, expected = time.monotonic() - start, work.result(whole)
    done, lost, wrong, unclear, slowest = 0, 0, 0, 0, 0.0
    while done < runs:
        before = work.standing(parts)
        one = folder / f"{done}.txt"
        life = lives.begin(lives.viar, *work.arguments(parts), told=one)
        life.process.join(draw.uniform(0.3, 1) * took)
        life.send(signal.SIGTERM)
        sent = time.monotonic()
        code, now = life.ended(), work.standing(parts)
        left = [name for name in lives.contents(parts) if name.endswith(LEFTOVERS)]
        lost += any(name not in now for name in before)
        wrong += any(now[name] != expected[name] for name in now) + bool(left and code == ENDED[0])
        if code in ENDED:
            done += 1
            slowest = max(slowest, time.monotonic() - sent)
            unclear += code == ENDED[0] and life.said().splitlines()[-1] != "viar: ended by SIGTERM"
        else:
            assert code == 0, life.said()
            shutil.rmtree(parts)
            parts.mkdir()
    assert lives.begin(lives.viar, *work.arguments(parts), told=told).ended() == 0
    wrong += work.result(parts) != expected
    return {"runs": done, "lost": lost, "wrong": wrong, "unclear": unclear}, slowest


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=in_full) for n in range(1, 5))])
def test_a_command_ends_in_one_line_without_half_a_file(
    number: int, pair: tuple[str, ...], tmp_path: Path, times: Times, tally: Tally
) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (9, 99, 199)).save(image)
    convert = converted("a checkpoint", Path(pair[1]), "out.pth")
    work = [series(pair, num=40), tokens(pair), picture(pair), edited(pair, image), convert][number]
    figures, slowest = ended(work, tmp_path, times(1, 20))
    tally("faults", f"SIGTERM: {work.what}", **figures)
    tally("ends", work.what, times=figures["runs"], slowest=round(slowest, 1))

"""Trains by the command line, is killed at random instants, and goes on; compared with a run left alone.

    python tests/viar/killed_runs.py FOLDER [KILLS] [SEED]

It is a program of its own because it forks, which saves loading everything for each life of a run and must
happen before any gradient is computed. A state is saved after every step, and a kill comes at a random
instant after the first state is there, so that kills fall into training and saving, not into the start.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from viar.commands.cli import main as viar

LIMIT = 300.0  # seconds after which a run is taken to hang
KEPT = ("model.safetensors", "config.json", "metrics.jsonl")  # what both runs must have in common


def live(arguments: list[str], out: Path) -> None:
    torch.set_num_threads(1)
    sys.argv = ["viar", *arguments, "--out", str(out)]
    out.parent.mkdir(exist_ok=True)
    with (out.parent / f"{out.name}.txt").open("a") as told, contextlib.redirect_stdout(told):
        viar()


def life(arguments: list[str], out: Path, seconds: float | None) -> bool:
    """Whether a run came to its end within so many seconds of its first state, after which it is killed.

    A run that goes on has a state: its seconds begin when that is replaced.
    """
    process = multiprocessing.get_context("fork").Process(target=live, args=(arguments, out))
    process.start()
    if seconds is not None:
        before, limit = saved_at(out), time.monotonic() + LIMIT
        while process.is_alive() and saved_at(out) in (None, before) and time.monotonic() < limit:
            time.sleep(0.002)
    process.join(LIMIT if seconds is None else seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        assert seconds is not None, f"{arguments} hangs"
        return False
    assert process.exitcode == 0, f"{arguments} ended with {process.exitcode}"
    return True


def saved_at(out: Path) -> int | None:
    """When the state that is there was written, in nanoseconds."""
    try:
        return (out / "state").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def killed(arguments: list[str], folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """How many kills fell where; raises `AssertionError` unless the outcome is that of a run left alone."""
    life(arguments, folder / "whole", None)
    trained = json.loads((folder / "whole" / "run.json").read_text())["result"]["seconds"]
    out, places = folder / "parts", dict[str, int]()
    while sum(places.values()) < kills:
        if not life(arguments, out, draw.uniform(0, trained)):
            place = where(out)
            places[place] = places.get(place, 0) + 1
        if finished(out):
            compare(out, folder / "whole")
            shutil.rmtree(out)
    if not finished(out):
        life(arguments, out, None)
    compare(out, folder / "whole")
    return places


def where(out: Path) -> str:
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names & {"state.new", "state.old"}:
        return "saving"
    return "training" if "state" in names else "starting or ending"


def finished(out: Path) -> bool:
    return (out / "model.safetensors").exists() and not (out / "state").exists()


def compare(out: Path, whole: Path) -> None:
    for name in KEPT:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{out / name} is another"


def main(folder: Path, kills: int, seed: int) -> None:
    gc.freeze()
    draw = random.Random(seed)
    common = ["--train.batch-size", "16", "--train.seconds", "None", "--train.save-every", "1e-6"]
    commands = {
        "tokenizer": ["train-tokenizer", "digits", "--train.steps", "24", *common],
        "transformer": [
            *("train", "digits-viar", "--train.steps", "24", *common),
            *("--tokenizer", str(folder / "tokenizer" / "whole")),
        ],
    }
    for name, arguments in commands.items():
        places = killed(arguments, folder / name, kills, draw)
        print(f"{name}: the same bit for bit after {sum(places.values())} kills, {places}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    given = sys.argv[2:]
    main(Path(sys.argv[1]), int(given[0]) if given else 2, int(given[1]) if given[1:] else 0)

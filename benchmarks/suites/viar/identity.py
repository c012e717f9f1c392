"""One seed, one series: `viar generate` in batches, processes and goes of all kinds, files compared.

The commands are real ones in processes of their own. What is compared is the bytes of the PNGs, with those
of a series that was made before in batches of 64.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ...case import SECONDS, Bar, Case, Metric, Row, Run, Table, none_of, product
from .models import digits_folder

SEED = 3
TIMEOUT = 900  # seconds a command may take
POLL = 0.02  # seconds between looks for the first files of a run to be killed


def build(run: Run, way: str, images: int) -> Iterator[Row]:
    """Images missing, images that differ from those of the first way, seconds.

    Args:
        run: decides whose models.
        way: of making the series, a name of `WAYS`.
        images: of the series.
    """
    models = digits_folder(run)
    reference = _reference(models, images)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "series"
        start = time.perf_counter()
        found = WAYS[way](models, images, folder)
        seconds = time.perf_counter() - start
        made = pictures(folder)
    yield {
        "missing": images - len(made),
        "differing": differing(made, reference),
        "seconds": [seconds],
        **found,
    }


@cache
def _reference(models: Path, images: int) -> dict[str, bytes]:
    """The series made at leisure, once a process."""
    with tempfile.TemporaryDirectory() as scratch:
        make_series(models, images, 64, 1, Path(scratch) / "series")
        return pictures(Path(scratch) / "series")


def pictures(folder: Path) -> dict[str, bytes]:
    """By name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def differing(images: dict[str, bytes], reference: dict[str, bytes]) -> int:
    """Files that are not in both with the same bytes."""
    return sum(images.get(name) != reference.get(name) for name in images.keys() | reference.keys())


def series_command(models: Path, num: int, batch: int, out: Path) -> list[str]:
    """Make images 0 to `num` - 1 in `out`."""
    return [
        *(sys.executable, "-m", "viar", "generate"),
        *("--model", str(models / "viar"), "--tokenizer", str(models / "tokenizer")),
        *("--num", str(num), "--format", "png", "--out", str(out)),
        *("--batch-size", str(batch), "--seed", str(SEED)),
    ]


def make_series(models: Path, num: int, batch: int, processes: int, out: Path) -> dict[str, int]:
    """Run the command to its end, in so many processes together; nothing to report.

    Raises:
        RuntimeError: a process ends with an error, whose message this holds.
    """
    command = series_command(models, num, batch, out)
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for env in _environments(processes)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{error[-2000:]}")
    return {}


def _environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would set; it cannot be asked itself, since it takes `--num` for an option of its own."""
    if processes == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return [{**os.environ, **shared, **rank} for rank in ranks]


def _interrupted(models: Path, num: int, batch: int, out: Path) -> dict[str, int]:
    """Killed, without a chance to tidy up, once it has written a quarter."""
    with subprocess.Popen(
        series_command(models, num, batch, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + TIMEOUT
        while len(list(out.glob("*.png"))) < num // 4 and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        process.kill()
    left = len(list(out.glob("*.png")))
    make_series(models, num, batch, 1, out)
    return {"left_when_killed": left}


# (models, images, folder) -> what there is to report besides
WAYS: dict[str, Callable[[Path, int, Path], dict[str, int]]] = {
    "batches of 64, again": lambda models, num, out: make_series(models, num, 64, 1, out),
    "batches of 7": lambda models, num, out: make_series(models, num, 7, 1, out),
    "batches of 1": lambda models, num, out: make_series(models, num, 1, 1, out),
    "two processes": lambda models, num, out: make_series(models, num, 7, 2, out),
    "killed and started again": lambda models, num, out: _interrupted(models, num, 7, out),
}


def bars(rows: list[Row]) -> list[Bar]:
    """Nothing may differ, and the kill must have hit."""
    wrong = {row["way"]: max(row["differing"], row["missing"]) for row in rows}
    note = ", ".join(f"{name}: {count}" for name, count in wrong.items() if count)
    missed = [
        row["way"]
        for row in rows
        if "left_when_killed" in row and not 0 < row["left_when_killed"] < row["images"]
    ]
    images = max(row["images"] for row in rows)
    return [
        Bar(f"files of {images} images that differ, worst of {len(rows)} ways", max(wrong.values()), 0, note),
        none_of("runs killed too early or too late to tell", missed),
    ]


def table(rows: list[Row]) -> Table:
    """One line a way."""
    head = ("way", "images", "missing", "differing", "left when killed", "seconds")
    names = ("images", "missing", "differing", "left_when_killed")
    lines = [
        (row["way"], *(str(row.get(name, "")) for name in names), f"{statistics.median(row['seconds']):.1f}")
        for row in rows
    ]
    return Table("one series, made in several ways", head, lines)


CASE = Case(
    "identity",
    "one seed in batches, processes and goes of all kinds: same files?",
    build,
    grid=product(way=WAYS, images=[200]),
    quick=product(way=["two processes", "killed and started again"], images=[40]),
    metrics={
        "missing": Metric(),
        "differing": Metric(),
        "seconds": SECONDS,
        "left_when_killed": Metric(None),
    },
    table=table,
    bars=bars,
)

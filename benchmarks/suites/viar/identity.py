"""One seed, one series: `viar generate` in batches, processes and goes of all kinds, files compared.

The commands are real ones in processes of their own. What is compared is the bytes of the PNGs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from ...report import Bar

SEED = 3
POLL = 0.02  # seconds between looks for the first files of a run to be killed


def measure(
    models: Path, num: int = 200, batches: tuple[int, ...] = (64, 7, 1), timeout: float = 900
) -> dict[str, dict[str, Any]]:
    """By way of making a series: images missing, images that differ from the first way's, seconds.

    Args:
        models: folder of the demo.
        num: images of the series.
        batches: sizes; the first is the reference, the last but one serves the other ways.
        timeout: seconds a command may take.
    """
    middle = batches[-2]
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"batches of {size}": partial(make_series, models, num, size, 1, timeout) for size in batches
    }
    ways["two processes"] = partial(make_series, models, num, middle, 2, timeout)
    ways["killed and started again"] = partial(_interrupted, models, num, middle, timeout)
    rows: dict[str, dict[str, Any]] = {}
    reference: dict[str, bytes] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for index, (name, make) in enumerate(ways.items()):
            folder = Path(scratch) / str(index)
            start = time.perf_counter()
            found = make(folder)
            seconds = time.perf_counter() - start
            images = pictures(folder)
            reference = images if reference is None else reference
            rows[name] = {
                "images": len(images),
                "missing": num - len(images),
                "differing": differing(images, reference),
                "seconds": seconds,
                **found,
            }
    return rows


def pictures(folder: Path) -> dict[str, bytes]:
    """By name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def differing(images: dict[str, bytes], reference: dict[str, bytes]) -> int:
    """Files that are not in both with the same bytes."""
    return sum(images.get(name) != reference.get(name) for name in images.keys() | reference.keys())


def series_command(models: Path, num: int, batch: int, out: Path) -> list[str]:
    """Make images 0 to `num` - 1 in `out`."""
    return [
        *(sys.executable, "-m", "viar.cli", "generate"),
        *("--model", str(models / "viar"), "--tokenizer", str(models / "tokenizer")),
        *("--num", str(num), "--format", "png", "--out", str(out)),
        *("--batch-size", str(batch), "--seed", str(SEED)),
    ]


def make_series(
    models: Path, num: int, batch: int, processes: int, timeout: float, out: Path
) -> dict[str, Any]:
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
        errors = [process.communicate(timeout=timeout)[1] for process in started]
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


def _interrupted(models: Path, num: int, batch: int, timeout: float, out: Path) -> dict[str, Any]:
    """Killed, without a chance to tidy up, once it has written a quarter."""
    with subprocess.Popen(
        series_command(models, num, batch, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + timeout
        while len(list(out.glob("*.png"))) < num // 4 and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        process.kill()
    left = len(list(out.glob("*.png")))
    make_series(models, num, batch, 1, timeout, out)
    return {"left_when_killed": left}


def bars(rows: dict[str, dict[str, Any]]) -> list[Bar]:
    """Nothing may differ, and the kill must have hit."""
    wrong = {name: max(row["differing"], row["missing"]) for name, row in rows.items()}
    note = ", ".join(f"{name}: {count}" for name, count in wrong.items() if count)
    hit = [
        name
        for name, row in rows.items()
        if "left_when_killed" in row and not 0 < row["left_when_killed"] < row["images"]
    ]
    images = max(row["images"] for row in rows.values())
    return [
        Bar(f"files of {images} images that differ, worst of {len(rows)} ways", max(wrong.values()), 0, note),
        Bar("runs killed too early or too late to tell", len(hit), 0, ", ".join(hit)),
    ]


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a way."""
    shown = Table(title=f"one series, {len(rows)} ways")
    for column in ("way", "images", "missing", "differing", "left when killed", "seconds"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for name, row in rows.items():
        numbers = (str(row.get(key, "")) for key in ("images", "missing", "differing", "left_when_killed"))
        shown.add_row(name, *numbers, f"{row['seconds']:.1f}")
    return shown

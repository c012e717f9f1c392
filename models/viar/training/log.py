"""What a run tells of itself while it trains: a line on the screen, a file of metrics, and trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..files import naming, replacing
from ..screen import is_watched

LOG_EVERY = 10  # steps; the first one is logged too
LINE_EVERY = 30.0  # seconds between two lines where no bar can be drawn, as in a file
SHOWN = ("loss", "accuracy", "psnr")  # of all metrics, on the line


def is_logged(step: int) -> bool:
    """Whether the metrics of a step, counted from 1, are read and kept."""
    return step == 1 or step % LOG_EVERY == 0


class RunLog:
    """Metrics of a run: a line of JSON for each step that is logged, all of them to trackers, some on a line.

    The file holds what a run that is repeated finds again; how fast it was, and in how much memory, is on
    the line and in the trackers. Processes other than the main one show and write nothing.

    Args:
        path: of the metrics. Lines of steps after `step`, of a run before or of one that was interrupted, are
            removed.
        name: shown on the line.
        step: where the run starts or goes on.
        seconds: spent training until there.
        progress: how far the run is there, 0 to 1.
        batch_size: images a step.
        device: whose memory is shown.
        is_main: whether this is the main process.
        trackers: that were started.
        console: where the line is shown; default standard output.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        step: int,
        seconds: float,
        progress: float,
        batch_size: int,
        device: torch.device,
        is_main: bool,
        trackers: Sequence[GeneralTracker] = (),
        console: Console | None = None,
    ) -> None:
        self.path, self.name, self.is_main, self.trackers = path, name, is_main, trackers
        self.batch_size, self.device = batch_size, device
        self.console = Console() if console is None else console
        if is_main and (num_damaged := _keep_until(path, step)):
            self.say(f"{path}: {num_damaged} damaged or unfinished lines are left out")
        self._step, self._seconds = step, seconds  # of the last line of metrics
        self._began, self._first_progress = time.monotonic(), progress
        self._line_at = -math.inf
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not (is_main and is_watched(self.console)),
        )
        self._task = self._bar.add_task(name, total=1.0, shown="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, there is a bar on the screen if there is a screen; trackers end with it."""
        try:
            with self._bar:
                yield
        finally:
            for tracker in self.trackers:
                tracker.finish()

    def write(self, step: int, seconds: float, progress: float, metrics: Mapping[str, float]) -> None:
        """Show and keep the metrics of a step.

        Args:
            step: counted from 1.
            seconds: spent training so far.
            progress: how far the run is, 0 to 1.
            metrics: by name.
        """
        if not self.is_main:
            return
        images = self.batch_size * (step - self._step)
        speed, memory = images / max(seconds - self._seconds, 1e-9), memory_bytes(self.device) / 1e9
        self._step, self._seconds = step, seconds
        self._keep(step, metrics)
        self._track("training", step, {**metrics, "images_per_second": speed, "memory_gb": memory})
        text = f"step {step}  {_listed(metrics)}  {speed:.3g} images/s  {memory:.3g} GB{self._left(progress)}"
        self._bar.update(self._task, completed=progress, shown=text)
        if self._bar.disable and time.monotonic() - self._line_at > LINE_EVERY:
            self._line_at = time.monotonic()
            self.say(f"{self.name}  {progress:4.0%}  {text}")

    def write_held_out(self, step: int, metrics: Mapping[str, float], note: str) -> None:
        """Show and keep what was measured of held-out data after a step.

        Args:
            step: counted from 1.
            metrics: by name, "loss" among them.
            note: what follows from them, in words; may be empty.
        """
        if self.is_main:
            self._keep(step, {f"validation_{name}": value for name, value in metrics.items()})
            self._track("validation", step, metrics)
            self.say(f"{self.name}  step {step}  held out: {_listed(metrics)}{note and f'  {note}'}")

    def say(self, text: str) -> None:
        """Show a line of text."""
        if self.is_main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, text: str) -> None:
        """Fill the bar, and say how the run ended."""
        self._bar.update(self._task, completed=1.0)
        self.say(f"{self.name}  {text}")

    def _left(self, progress: float) -> str:
        done = progress - self._first_progress
        if done <= 0:
            return ""
        left = (time.monotonic() - self._began) / done * (1 - progress)
        return f"  {timedelta(seconds=round(left))} left"

    def _keep(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _track(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log({f"{group}/{name}": value for name, value in metrics.items()}, step=step)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, without those that are damaged or not written to their end."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, float]], int]:
    """The lines that are numbers by name with their step, and how many are not."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        numbers = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
        if numbers and type(row.get("step")) is int:
            rows.append(row)
    return rows, len(lines) - len(rows)


def memory_bytes(device: torch.device) -> int:
    """The most memory that PyTorch has had on a GPU; on a CPU what the process has in memory now.

    Args:
        device: of the run.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _keep_until(path: Path, step: int) -> int:
    """Remove what a metrics.jsonl tells of later steps: they are yet to come, or come again.

    Damaged lines are removed too; how many there were.
    """
    found, num_damaged = _read(path)
    rows = [row for row in found if row["step"] <= step]
    if not rows:
        path.unlink(missing_ok=True)
        return num_damaged
    with replacing(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return num_damaged


def _listed(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)

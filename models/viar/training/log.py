"""What a run tells of itself while it trains: a progress bar, and a file of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class RunLog:
    """Progress bar and metrics of a run, a line of JSON for each step that is logged.

    The bar is shown inside of `with log.bar:`. Processes other than the main one show and write nothing.

    Args:
        path: of the metrics; those of a run before are removed where this one starts at step 0, and continued
            otherwise.
        name: shown beside the bar.
        step: where the run starts or goes on.
        is_main: whether this is the main process.
        console: where the bar is shown; default standard output.
    """

    def __init__(self, path: Path, name: str, step: int, *, is_main: bool, console: Console | None) -> None:
        self.path, self.is_main = path, is_main
        if is_main and step == 0:
            path.unlink(missing_ok=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.fields[step]}  {task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not is_main,
        )
        self._task = self.bar.add_task(name, total=1.0, step=step, shown="")

    def write(self, step: int, progress: float, metrics: Mapping[str, float]) -> None:
        """Show and write the metrics of a step."""
        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        self.bar.update(self._task, completed=progress, step=step, shown=shown)
        if self.is_main:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def finish(self, step: int) -> None:
        """Fill the bar."""
        self.bar.update(self._task, completed=1.0, step=step)

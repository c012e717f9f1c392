"""Progress of a series on the screen."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...screen import is_watched
from .folder import SeriesFolder

LOOK_EVERY = 0.5  # seconds between two counts of the files


class SeriesProgress:
    """Progress over the images of all processes, counted by their files. A context that shows a bar.

    Attributes:
        seconds: since the start, at the last look.
    """

    def __init__(
        self, target: SeriesFolder, num: int, missing: int, console: Console | None, *, shown: bool
    ) -> None:
        self.target, self.num, self.before, self.shown = target, num, num - missing, shown
        self.progress = Progress(
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and is_watched(console)),
        )

    def __enter__(self) -> SeriesProgress:
        self.start = self.looked = time.monotonic()
        self.seconds = 0.0
        self.progress.start()
        self.task = self.progress.add_task("generate", total=self.num, completed=self.before, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def look(self, *, now: bool = False) -> None:
        """Count the files and show how many there are, if it is time to or has to be `now`."""
        seconds = time.monotonic() - self.start
        if not now and time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked, self.seconds = time.monotonic(), seconds
        if self.shown:
            done = max(self.target.count(self.num), self.before)
            rate = f"{(done - self.before) / max(seconds, 1e-9):.3g} images/s"
            self.progress.update(self.task, completed=done, rate=rate)

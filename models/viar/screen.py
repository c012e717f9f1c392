"""Progress on the screen, where there is one: nothing of it gets into files and pipes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def is_watched(console: Console | None) -> bool:
    """Whether somebody may see what moves on a console: it is that of a terminal or of a notebook.

    Args:
        console: where progress is shown; default standard output.
    """
    console = get_console() if console is None else console
    return console.is_terminal or console.is_jupyter


def tracked(
    items: Iterable[Item], name: str, *, total: int | None = None, console: Console | None = None
) -> Iterator[Item]:
    """Items one after another, with a bar that moves while one is worked on too, where it can be seen.

    Args:
        items: of the work.
        name: of the work, on the screen.
        total: how many there are; default their length.
        console: where the bar is shown; default standard output.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not is_watched(console)) as progress:
        yield from progress.track(items, total=total, description=name)

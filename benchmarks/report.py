"""What suites hand in: bars, and where they were measured."""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deqlib.testing import Problem


@dataclass(frozen=True)
class Bar:
    """A figure and the bar that it has to meet.

    Attributes:
        name: what was measured.
        value: the figure; NaN where nothing was measured.
        limit: the most it may be.
        note: what one should know beside the figure, such as the cases that break the bar.
    """

    name: str
    value: float
    limit: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        if math.isnan(self.value):
            return "not measured"
        return "pass" if self.value <= self.limit else "FAIL"

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity."""
        value = self.value if math.isfinite(self.value) else None
        return {**asdict(self), "value": value, "verdict": self.verdict}


def none_of(name: str, cases: list[str], note: str = "") -> Bar:
    """The bar that there be no such case."""
    return Bar(name, len(cases), 0, "; ".join([note] * bool(note) + cases))


def bars_table(bars: list[Bar]) -> Table:
    """One line a bar."""
    table = Table(title="bars")
    for column, justify in (("bar", "left"), ("value", "right"), ("limit", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    table.add_column("note", overflow="fold")
    for bar in bars:
        style = {"pass": "green", "FAIL": "red"}.get(bar.verdict, "yellow")
        verdict = f"[{style}]{bar.verdict}[/]"
        table.add_row(bar.name, f"{bar.value:.4g}", f"{bar.limit:g}", verdict, escape(bar.note))
    return table


Measured = tuple[Any, list[Bar], Table]  # the figures of a part, its bars and its table
Subject = TypeVar("Subject")


def measure_parts(
    arguments: argparse.Namespace,
    parts: Mapping[str, Callable[[Subject, argparse.Namespace], Measured]],
    subject: Subject,
    console: Console,
) -> dict[str, Any]:
    """Measure the parts of a suite that `arguments.part` asks for, print tables and bars; the figures.

    Args:
        arguments: of the command line, with `part`, `threads` and `out`.
        parts: by name, in the order in which they run.
        subject: what is measured, handed to every part.
        console: to print to.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    figures: dict[str, Any] = {"machine": machine(), "settings": settings, "parts": {}}
    bars: list[Bar] = []
    for part, measure in parts.items():
        if part in arguments.part:
            figures["parts"][part], found, table = measure(subject, arguments)
            console.print(table)
            bars += found
    console.print(bars_table(bars))
    figures["bars"] = [bar.record() for bar in bars]
    return figures


def choose(problems: list[Problem], names: list[str] | None) -> list[Problem]:
    """Those with these names, in their order; all if there are none. Ends the program at a name unknown."""
    named = {problem.name: problem for problem in problems}
    unknown = set(names or ()) - set(named)
    if unknown:
        raise SystemExit(f"--problems: got {sorted(unknown)}, expected names among {list(named)}")
    return [named[name] for name in names or named]


def terminal() -> Console:
    """Where a suite prints; a file has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 140)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

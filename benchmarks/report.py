"""What suites hand in: bars, and where they were measured."""

from __future__ import annotations

import datetime
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table


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


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

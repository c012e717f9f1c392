"""Tables and pictures of rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .case import Bar, Case, Row, Table
from .results import Results

COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#2e4057", "#8d96a3", "#c97b63", "#4f772d")

NOTE = 110  # characters of a note that the documentation shows; the file has it whole


def terminal() -> Console:
    """Where everything is printed; a file has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 140)


def terminal_table(table: Table) -> RichTable:
    """For the terminal."""
    shown = RichTable(title=table.title)
    for index, head in enumerate(table.head):
        shown.add_column(escape(head), justify="right" if index else "left", overflow="fold")
    for line in table.lines:
        shown.add_row(*map(escape, line))
    return shown


def bars_table(bars: Sequence[Bar]) -> RichTable:
    """One line a bar."""
    shown = RichTable(title="bars")
    for column, justify in (("bar", "left"), ("value", "right"), ("limit", "right"), ("", "left")):
        shown.add_column(column, justify=justify)
    shown.add_column("note", overflow="fold")
    for bar in bars:
        style = {"pass": "green", "FAIL": "red"}.get(bar.verdict, "yellow")
        verdict = f"[{style}]{bar.verdict}[/]"
        shown.add_row(escape(bar.name), f"{bar.value:.4g}", f"{bar.limit:.4g}", verdict, escape(bar.note))
    return shown


def markdown_table(table: Table) -> str:
    """For the documentation, without the title."""
    rule = ["---"] + ["---:"] * (len(table.head) - 1)
    lines = [table.head, rule, *table.lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def bars_markdown(bars: Sequence[dict[str, Any]]) -> str:
    """For the documentation, from the records in a file: a bar that is missed says by how much."""
    lines = []
    for bar in bars:
        value, limit, verdict = bar["value"], bar["limit"], bar["verdict"]
        if verdict == "FAIL" and value is not None and limit:
            verdict = f"missed: {value / limit:.3g} x"
        shown = "-" if value is None else f"{value:.4g}"
        note = shorten(bar["note"], NOTE, placeholder=" ...")
        lines.append((bar["name"], shown, f"{limit:.4g}", verdict, note))
    return markdown_table(Table("bars", ("what", "measured", "at most", "", "note"), lines))


def draw(case: Case, rows: list[Row], path: Path) -> None:
    """The picture of a case as a PNG."""
    assert case.picture is not None
    titles = case.picture.panels(rows)
    columns = min(case.picture.columns, len(titles))
    lines = -(-len(titles) // columns)
    width, height = case.picture.size
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    case.picture.paint(rows, axes[: len(titles)])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def logarithmic(axis: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at each of these values, written out, and no others."""
    ticks = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{value:,.7g}" for value in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def draw_all(cases: Sequence[Case], results: Results, folder: Path, prefix: str) -> list[Path]:
    """PREFIX_CASE.png of every case that has rows and a picture."""
    paths = []
    for case in cases:
        rows = results.rows(case.name)
        if rows and case.picture is not None:
            paths.append(folder / f"{prefix}_{case.name}.png")
            draw(case, rows, paths[-1])
    return paths

"""Tables of rows: how they are made, and how they are written for the terminal and for Markdown."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any, Literal

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as RichTable

from ..case import Bar, Row, Table

_FRAME = 3  # characters between two columns of a table in the terminal
NOTE = 110  # characters of a note that the documentation shows; the file has it whole


def listing(title: str, rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    """One line a row; `columns` are by their heads."""
    return Table(title, tuple(columns), [tuple(cell(row) for cell in columns.values()) for row in rows])


def pivot(
    title: str,
    rows: Iterable[Row],
    corner: str,
    line: str | Callable[[Row], str],
    column: str | Callable[[Row], str],
    cell: Callable[[Row], str],
    *,
    missing: str = "-",
    more: Mapping[str, Callable[[list[Row]], str]] | None = None,
) -> Table:
    """One line and one column for whatever rows differ in, in the order in which they come.

    Args:
        title: what the cells are.
        rows: at most one for every cell.
        corner: head of the first column.
        line: of a row: the first cell of its line, or the name of what it is.
        column: of a row: the head of its column, or the name of what it is.
        cell: of a row.
        missing: cell of which there is no row.
        more: further columns by their heads, made from all rows of a line.
    """
    lines: dict[str, dict[str, Row]] = {}
    heads: dict[str, None] = {}
    for row in rows:
        name, head = (str(row[of]) if isinstance(of, str) else of(row) for of in (line, column))
        lines.setdefault(name, {})[head] = row
        heads[head] = None
    more = more or {}
    cells = [
        (
            name,
            *(cell(found[head]) if head in found else missing for head in heads),
            *(total(list(found.values())) for total in more.values()),
        )
        for name, found in lines.items()
    ]
    return Table(title, (corner, *heads, *more), cells)


def terminal() -> Console:
    """Where everything is printed; a file, which has no width of its own, gets 100 columns."""
    return Console(width=None if sys.stdout.isatty() else 100)


def terminal_table(table: Table, width: int) -> Group:
    """For a terminal of so many columns: in parts, one below another, where words would break."""
    columns = list(zip(table.head, *table.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(map(_longest, column)) for column in columns]
    shown: list[RichTable] = []
    for part in _parts(least, width):
        piece = RichTable(title=None if shown else table.title)
        # Of its own accord rich narrows the widest columns first, and breaks their words.
        room = _room([widths[i] for i in part], [least[i] for i in part], width - _FRAME * len(part) - 1)
        for index, columns_of_it in zip(part, room, strict=True):
            justify: Literal["left", "right"] = "right" if index else "left"
            head = escape(table.head[index])
            piece.add_column(head, justify=justify, overflow="fold", width=columns_of_it)
        for line in table.lines:
            piece.add_row(*(escape(line[index]) for index in part))
        shown.append(piece)
    return Group(*shown)


def _longest(cell: str) -> int:
    """Characters of the longest word; a figure and its spread are one."""
    return len(cell) if "±" in cell else max(map(len, [*cell.split(), ""]))


def _parts(least: Sequence[int], width: int) -> list[list[int]]:
    """Columns of each part, the first one in all of them, as many as fit with their longest words."""
    parts = [[0]]
    for index in range(1, len(least)):
        wanted = sum(least[i] + _FRAME for i in [*parts[-1], index]) + 1
        if len(parts[-1]) > 1 and wanted > width:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _room(wanted: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Widths of columns: what is left beside the longest words goes to whoever lacks most."""
    found = list(least)
    while sum(found) < width and found != list(wanted):
        lacking = max(range(len(found)), key=lambda i: wanted[i] - found[i])
        found[lacking] += 1
    return found


def bars_table(bars: Sequence[Bar]) -> RichTable:
    """One line a bar."""
    shown = RichTable(title="bars")
    shown.add_column("bar")
    shown.add_column("value", justify="right")
    shown.add_column("limit", justify="right")
    shown.add_column("verdict")
    shown.add_column("note", overflow="fold")
    for bar in bars:
        style = {"pass": "green", "FAIL": "red"}.get(bar.verdict, "yellow")
        verdict = f"[{style}]{bar.verdict}[/]"
        value = "-" if math.isnan(bar.value) else f"{bar.value:.4g}"
        shown.add_row(escape(bar.name), value, f"{bar.limit:.4g}", verdict, escape(bar.note))
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
            verdict = f"missed:\u00a0{value / limit:.3g}\u00a0x"  # on one line, however narrow the table
        shown = "-" if value is None else f"{value:.4g}"
        note = shorten(bar["note"], NOTE, placeholder=" ...")
        lines.append((bar["name"], shown, f"{limit:.4g}", verdict, note))
    return markdown_table(Table("bars", ("what", "measured", "at most", "verdict", "note"), lines))

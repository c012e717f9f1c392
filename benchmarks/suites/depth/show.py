"""Rows by contender and depth: tables, and panels whose colours all cases share."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from ...case import Row, Table
from ...rows import distinct, having
from ...show import COLORS, curve, logarithmic, pivot
from .contenders import CONTENDERS

STYLES = {
    name: ("o-" if name.startswith("explicit") else "s--", COLORS[i]) for i, name in enumerate(CONTENDERS)
}


def by_depth(rows: list[Row], title: str, cell: Callable[[Row], str]) -> Table:
    """One line a contender, one column a depth, parameters at the end."""
    return pivot(
        title,
        rows,
        "contender",
        "contender",
        lambda row: f"depth {row['depth']}",
        cell,
        missing="",
        more={"parameters": _parameters},
    )


def _parameters(rows: list[Row]) -> str:
    """The fewest and the most."""
    counts = sorted({row["parameters"] for row in rows})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def plot_by_depth(axis: Axes, rows: list[Row], figure: str | Callable[[Row], float | None]) -> None:
    """One line a contender over the depths at which it has a figure."""
    for index, name in enumerate(distinct(rows, "contender")):
        style, color = STYLES[name]
        # Later lines are thinner: where two coincide, both are seen.
        size = {"linewidth": max(1.0, 4 - index), "markersize": max(3.0, 8 - index)}
        curve(axis, having(rows, contender=name), "depth", figure, style, color=color, label=name, **size)
    depth_axis(axis, rows)


def depth_axis(axis: Axes, rows: list[Row]) -> None:
    """A logarithmic axis with a tick at every depth; solves to a tolerance have none and get no tick."""
    logarithmic(axis, (row["depth"] for row in rows if row["depth"] is not None))
    axis.set(xlabel="depth")

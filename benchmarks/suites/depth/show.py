"""Tables and panels of rows by contender and depth."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ...case import Row, Table
from ...show import COLORS
from .contenders import CONTENDERS

STYLES = {
    name: ("o-" if name.startswith("explicit") else "s--", COLORS[i]) for i, name in enumerate(CONTENDERS)
}


def contenders_of(rows: list[Row]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(row["contender"] for row in rows))


def depths_of(rows: list[Row]) -> list[int]:
    """Ascending, each once."""
    return sorted({row["depth"] for row in rows if row["depth"] is not None})


def by_depth(rows: list[Row], title: str, cell: Callable[[Row], str]) -> Table:
    """One line a contender, one column a depth, parameters at the end."""
    depths = depths_of(rows)
    lines = []
    for name in contenders_of(rows):
        found = {row["depth"]: row for row in rows if row["contender"] == name}
        cells = [cell(found[depth]) if depth in found else "" for depth in depths]
        counts = sorted({row["parameters"] for row in found.values()})
        lines.append(
            (name, *cells, " to ".join(f"{count:,}" for count in counts[:: max(1, len(counts) - 1)]))
        )
    return Table(title, ("contender", *(f"depth {depth}" for depth in depths), "parameters"), lines)


def plot_by_depth(axis: Axes, rows: list[Row], figure: Callable[[Row], float | None]) -> None:
    """One line a contender over the depths at which it has a figure, in colours that all panels share."""
    for index, name in enumerate(contenders_of(rows)):
        points = sorted((row["depth"], figure(row)) for row in rows if row["contender"] == name)
        points = [(depth, value) for depth, value in points if value is not None]
        style, color = STYLES[name]
        # Later lines are thinner: where two coincide, both are seen.
        axis.plot(
            [depth for depth, _ in points],
            [value for _, value in points],
            style,
            color=color,
            label=name,
            linewidth=max(1.0, 4 - index),
            markersize=max(3.0, 8 - index),
        )
    ticks_at_depths(axis, rows)


def ticks_at_depths(axis: Axes, rows: list[Row]) -> None:
    """A logarithmic axis with a tick at every depth."""
    axis.set(xscale="log", xlabel="depth")
    axis.set_xticks(depths_of(rows), [str(depth) for depth in depths_of(rows)])
    axis.xaxis.set_minor_locator(NullLocator())

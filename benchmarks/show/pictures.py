"""Pictures of rows: panels, and what is drawn in several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from viar.files import replacing

from ..case import Case, Row
from ..results import Results
from ..rows import figure as number

COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#2e4057", "#8d96a3", "#c97b63", "#4f772d")

Figures = str | Callable[[Row], float | None]  # name of a column, or what is made of a row


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
    with replacing(path) as file:
        figure.savefig(file, dpi=120)


def draw_all(cases: Sequence[Case], results: Results, folder: Path, prefix: str) -> list[Path]:
    """PREFIX_CASE.png of every case that has rows and a picture."""
    paths = []
    for case in cases:
        rows = results.rows(case.name)
        if rows and case.picture is not None:
            paths.append(folder / f"{prefix}_{case.name}.png")
            draw(case, rows, paths[-1])
    return paths


def curve(axis: Axes, rows: Iterable[Row], x: Figures, y: Figures, style: str = "o-", **look: Any) -> None:
    """A line through the points of the rows that have both figures, from left to right; lists by medians.

    Args:
        axis: to draw on.
        rows: one a point.
        x: figure that decides the place.
        y: figure that decides the height.
        style: of the line and its marks, as `Axes.plot` takes it.
        **look: of `Axes.plot`.
    """
    pairs = [(_figure(row, x), _figure(row, y)) for row in rows]
    points = sorted((at, height) for at, height in pairs if at is not None and height is not None)
    if points:
        axis.plot([at for at, _ in points], [height for _, height in points], style, **look)


def _figure(row: Row, of: Figures) -> float | None:
    return number(row[of]) if isinstance(of, str) else of(row)


def logarithmic(axis: Axes, values: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at each of these values, written out, and no others."""
    ticks = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{value:,.7g}" for value in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def one_two_five(axis: Axes) -> None:
    """Ticks 1, 2, 5, 10, ... of a logarithmic x axis, written out."""
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend_below(axes: Sequence[Axes], columns: int, fontsize: int = 8) -> None:
    """One legend for all panels, that of the first, below them."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure = axes[0].figure
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=fontsize
    )

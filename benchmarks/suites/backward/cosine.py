"""How far the gradients of cheap modes point from the exact one, by the spectral radius of J."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from matplotlib.axes import Axes

from ...case import Case, Metric, Picture, Row, Run, Table, product
from ...rows import distinct, having
from ...show import COLORS, curve, pivot
from .random_maps import CHEAP, draw, exact, gradients, reference

MODES = ("JFB", *(name for name in CHEAP if "neumann" in name))  # both forms give the same direction


def build(run: Run, radius: float, count: int) -> Iterator[Row]:
    """Median and least cosine of every mode over so many problems."""
    problems = [draw(seed, radius, run.device) for seed in range(count)]
    rights = [reference(problem, exact) for problem in problems]
    for name in MODES:
        found = [
            float(torch.nn.functional.cosine_similarity(gradients(problem, CHEAP[name].mode), right, dim=0))
            for problem, right in zip(problems, rights, strict=True)
        ]
        shown = name.replace(", neumann", "")
        yield {"contender": shown, "median": statistics.median(found), "least": min(found)}


def table(rows: list[Row]) -> Table:
    """One line a mode."""
    title = "cosine to the exact gradient, median (least), by spectral radius of J"
    return pivot(
        title, rows, "mode", "contender", "radius", lambda row: f"{row['median']:.3f} ({row['least']:.2f})"
    )


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Medians, and below them the least of each mode."""
    (axis,) = axes
    for name, color in zip(distinct(rows, "contender"), COLORS, strict=False):
        found = having(rows, contender=name)
        curve(axis, found, "radius", "median", color=color, label=name)
        curve(axis, found, "radius", "least", ":", color=color, linewidth=1.2)
    axis.set(xlabel="spectral radius of J", ylabel="cosine: median, dotted the least")
    axis.legend(frameon=False, fontsize=8)


CASE = Case(
    "cosine",
    "cosine of cheap modes to the exact gradient, by spectral radius",
    build,
    grid=product(radius=[0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99], count=[40]),
    quick=product(radius=[0.5, 0.8, 0.95], count=[4]),
    metrics={"median": Metric("higher", noisy=True), "least": Metric("higher", noisy=True)},
    table=table,
    picture=Picture(_paint, lambda rows: ("direction of cheap gradients",), size=(6, 4.2)),
)

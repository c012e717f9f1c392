"""How the residual falls, evaluation by evaluation and over time.

The cell is watched, so that everybody is seen alike: an evaluation counts whatever it is for, and the last
one of a line search, or a difference quotient, is a point as any other.
"""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from matplotlib.axes import Axes

from deqlib.testing import Problem

from ... import maps
from ...case import Case, Metric, Picture, Row, Run, Table, product
from ...measure import Watched, interleaved
from ...rows import distinct, having
from ...show import legend_below, pivot
from .contenders import CONTENDERS, ONCE, head, not_run, style

LARGEST = 10.0  # residual that a picture shows


def build(run: Run, problem: str, rtol: float, max_evaluations: int) -> list[Row]:
    """Residuals of every contender, from the round whose time is the median."""
    subject = maps.named(problem, run.device)
    names = [name for name in CONTENDERS if not_run(name, subject) is None]
    found: dict[str, list[Watched]] = {name: [] for name in names}
    solves = {name: partial(_watch, found[name], subject, name, rtol, max_evaluations) for name in names}
    with torch.no_grad():
        times = interleaved(solves, run.rounds, limit=ONCE)
    rows = []
    for name in names:
        counted = [seen for seen in found[name][-len(times[name]) :] if seen.seconds]
        if not counted:  # it raised before it asked for anything
            continue
        seen = sorted(counted, key=lambda seen: seen.seconds[-1])[len(counted) // 2]
        rows.append(
            {
                "contender": name,
                "residuals": [_short(value, 3) if math.isfinite(value) else None for value in seen.residuals],
                "seconds": [_short(value, 4) for value in seen.seconds],
            }
        )
    return rows


def _watch(found: list[Watched], problem: Problem, name: str, rtol: float, evaluations: int) -> None:
    found.append(Watched(problem.cell))
    with suppress(Exception):  # what was seen before stays; `solves` says who raises
        CONTENDERS[name](replace(problem, cell=found[-1]), rtol, evaluations)


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def smallest(row: Row) -> list[float]:
    """The smallest residual so far, at every evaluation."""
    return list(itertools.accumulate((math.inf if r is None else r for r in row["residuals"]), min))


def table(rows: list[Row]) -> Table:
    """One line a problem."""
    title = "smallest relative residual / ms until it came"
    return pivot(title, rows, "problem", "problem", head, _cell)


def _cell(row: Row) -> str:
    least = smallest(row)[-1]
    if not math.isfinite(least):
        return "none is finite"
    return f"{least:.0e} / {row['seconds'][row['residuals'].index(least)] * 1e3:,.0f}"


def _panels(rows: list[Row]) -> list[str]:
    return [f"{name}, {axis}" for name in distinct(rows, "problem") for axis in ("evaluations", "ms")]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Two panels a problem: over evaluations, and over time."""
    for index, problem in enumerate(distinct(rows, "problem")):
        pair = axes[2 * index : 2 * index + 2]
        found = having(rows, problem=problem)
        for row in found:
            places = range(1, len(row["residuals"]) + 1), [t * 1e3 for t in row["seconds"]]
            for axis, place in zip(pair, places, strict=True):
                axis.plot(place, smallest(row), linewidth=1.2, **style(row["contender"]))
        for axis in pair:
            axis.axhline(found[0]["rtol"], color="grey", linewidth=0.8)
            axis.set(xscale="log", yscale="log", ylim=(found[0]["rtol"] / 10, LARGEST))
    legend_below(axes, 4, fontsize=9)
    axes[0].figure.supylabel("smallest relative residual so far, worst sample")


CASE = Case(
    "traces",
    "the residual after every evaluation, and when it came",
    build,
    grid=product(problem=maps.NAMES, rtol=[1e-5], max_evaluations=[maps.MAX_EVALUATIONS]),
    quick=product(problem=maps.QUICK, rtol=[1e-3], max_evaluations=[40]),
    metrics={"residuals": Metric(better=None), "seconds": Metric(better=None)},
    table=table,
    picture=Picture(_paint, _panels, columns=4, size=(3.4, 2.5)),
)

"""How the residual falls, evaluation by evaluation and over time.

The cell is watched, so that everybody is seen alike: an evaluation counts whatever it is for, and the last
one of a line search, or a difference quotient, is a point as any other.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib.testing import Problem

from ... import problems
from ...case import Case, Metric, Picture, Row, Run, Table, product
from ...contenders import CONTENDERS, not_run, style, worst_residual
from ...timing import interleaved
from .solves import ONCE, heads

LARGEST = 10.0  # residual that a picture shows


@dataclass
class Watched:
    """A cell that records the largest relative residual of each batch it sees, and when it came.

    Attributes:
        cell: which is watched.
        residuals: one a call.
        seconds: one a call, since it was made, without what recording takes.
    """

    cell: Callable[..., Tensor]
    residuals: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)  # moves on while something is recorded

    def __call__(self, z: Tensor, *inputs: Any) -> Tensor:
        """The cell."""
        fz = self.cell(z, *inputs)
        if fz.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.residuals.append(worst_residual(z, fz))
        self.begin += time.perf_counter() - now
        return fz


def build(run: Run, problem: str, rtol: float, max_evaluations: int) -> list[Row]:
    """Everybody's residuals, of the round whose time is the median."""
    subject = problems.named(problem, run.device)
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
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(row["problem"], row["contender"]): _cell(row) for row in rows}
    lines = [
        (problem, *(cells.get((problem, name), "-") for name in names))
        for problem in dict.fromkeys(row["problem"] for row in rows)
    ]
    return Table("smallest relative residual / ms until it came", ("problem", *heads(names)), lines)


def _cell(row: Row) -> str:
    least = smallest(row)[-1]
    if not math.isfinite(least):
        return "none is finite"
    return f"{least:.0e} / {row['seconds'][row['residuals'].index(least)] * 1e3:,.0f}"


def _panels(rows: list[Row]) -> list[str]:
    names = dict.fromkeys(row["problem"] for row in rows)
    return [f"{name}, {axis}" for name in names for axis in ("evaluations", "ms")]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Two panels a problem: over evaluations, and over time."""
    for index, problem in enumerate(dict.fromkeys(row["problem"] for row in rows)):
        pair = axes[2 * index : 2 * index + 2]
        found = [row for row in rows if row["problem"] == problem]
        for row in found:
            places = range(1, len(row["residuals"]) + 1), [t * 1e3 for t in row["seconds"]]
            for axis, place in zip(pair, places, strict=True):
                axis.plot(place, smallest(row), linewidth=1.2, **style(row["contender"]))
        for axis in pair:
            axis.axhline(found[0]["rtol"], color="grey", linewidth=0.8)
            axis.set(xscale="log", yscale="log", ylim=(found[0]["rtol"] / 10, LARGEST))
    handles, labels = axes[0].get_legend_handles_labels()
    figure = axes[0].figure
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.supylabel("smallest relative residual so far, worst sample")


CASE = Case(
    "traces",
    "the residual after every evaluation, and when it came",
    build,
    grid=product(problem=problems.NAMES, rtol=[1e-5], max_evaluations=[problems.MAX_EVALUATIONS]),
    quick=product(problem=problems.QUICK, rtol=[1e-3], max_evaluations=[40]),
    metrics={"residuals": Metric(better=None), "seconds": Metric(better=None)},
    table=table,
    picture=Picture(_paint, _panels, columns=4, size=(3.4, 2.5)),
)

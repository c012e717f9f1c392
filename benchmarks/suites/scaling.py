"""How a step of a solve grows in time and memory: with the state, the batch, the history.

The cell is one elementwise operation, so what is measured is the solver. Steps are counted, not tolerances
met. A slope is that of a straight line through the logarithms of the largest half of the grid: 1 is linear.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes

from deqlib import Anderson, Broyden, Picard, Solver, Stopping, fixed_point

from ..case import SECONDS, Case, Metric, Picture, Row, Run, Settings, Table
from ..maps import elementwise
from ..measure import interleaved, marked, milliseconds, peak_bytes
from ..rows import distinct, figure, having
from ..show import COLORS, curve, logarithmic, pivot

STEPS = 64  # four times the longest history, so that it is full most of the time
SOLVERS: dict[str, Callable[[int], Solver]] = {
    "Picard": lambda memory: Picard(),
    "Anderson": lambda memory: Anderson(memory=memory),
    "Broyden": lambda memory: Broyden(memory=memory),
}
METRICS = {"seconds": SECONDS, "peak_bytes": Metric()}


def build(run: Run, batch: int, width: int, memory: int) -> Iterator[Row]:
    """Seconds a step and peak bytes of every solver."""
    solves = {name: _solve(run, SOLVERS[name](memory), batch, width) for name in SOLVERS}
    with torch.no_grad():
        times = interleaved(solves, run.rounds)
        peaks = {name: peak_bytes(solve, run.device) for name, solve in solves.items()}
    for name in solves:
        seconds = [t / STEPS for t in times[name]]
        yield {"contender": name, "seconds": seconds, "peak_bytes": peaks[name]}


def _solve(run: Run, solver: Solver, batch: int, width: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator).to(run.device)
    # So slow that no solver arrives: at rest, histories begin anew.
    rates = torch.rand(batch, width, generator=generator).mul_(0.999).to(run.device)
    return partial(
        fixed_point,
        marked(elementwise),
        torch.zeros_like(x),
        (x, rates),
        solver=solver,
        stopping=Stopping(rtol=1e-30, max_steps=STEPS, patience=None),  # measured, but never met
        on_failure="ignore",
    )


def _profiled(run: Run, **settings: Any) -> Callable[[], object]:
    return _solve(run, Anderson(memory=settings["memory"]), settings["batch"], settings["width"])


def _grid(name: str, values: Sequence[int]) -> list[Settings]:
    """One setting varies."""
    usual = {"batch": 8, "width": 65536, "memory": 5}
    return [{**usual, name: value} for value in values]


def slope(rows: list[Row], name: str, metric: str, contender: str) -> float:
    """Of the logarithm of a metric over that of a setting, largest half of the grid; NaN of one point."""
    found = sorted((row[name], figure(row[metric]) or math.nan) for row in having(rows, contender=contender))
    found = found[len(found) // 2 :] if len(found) > 2 else found
    if len(found) < 2:
        return math.nan
    xs, ys = ([math.log(pair[i]) for pair in found] for i in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def _table(name: str, rows: list[Row]) -> Table:
    def slopes(metric: str) -> Callable[[list[Row]], str]:
        return lambda line: f"{slope(line, name, metric, line[0]['contender']):.2f}"

    return pivot(
        "ms a step / peak MB",
        rows,
        "solver",
        line="contender",
        column=lambda row: f"{name} {row[name]}",
        cell=lambda row: f"{milliseconds(row['seconds'])} / {row['peak_bytes'] / 1e6:,.3g}",
        more={"slope, time": slopes("seconds"), "slope, memory": slopes("peak_bytes")},
    )


def _paint(name: str, rows: list[Row], axes: list[Axes]) -> None:
    for axis, metric in zip(axes, METRICS, strict=True):
        for contender, color in zip(SOLVERS, COLORS, strict=False):
            label = f"{contender}, slope {slope(rows, name, metric, contender):.2f}"
            curve(axis, having(rows, contender=contender), name, metric, color=color, label=label)
        axis.set(yscale="log", xlabel=name)
        logarithmic(axis, distinct(rows, name))
        axis.legend(frameon=False, fontsize=8)


def _case(name: str, about: str, values: Sequence[int], few: Sequence[int]) -> Case:
    return Case(
        name,
        about,
        build,
        grid=_grid(name, values),
        quick=_grid(name, few),
        metrics=METRICS,
        table=partial(_table, name),
        picture=Picture(partial(_paint, name), lambda rows: ("seconds a step", "peak bytes of a solve")),
        solve=_profiled,
    )


CASES = (
    _case("width", "numbers of a sample's state", [2**k for k in range(10, 21, 2)], [1024, 4096, 16384]),
    _case("batch", "samples", [2**k for k in range(0, 9, 2)], [1, 4, 16]),
    _case("memory", "columns of the history", [2, 4, 8, 16], [2, 4, 8]),
)

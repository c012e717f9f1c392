"""Batches of easy and hard samples: work and time where finished ones leave, and where they do not.

The last samples of a batch converge at a slower rate than the others (`deqlib.testing.mixed_difficulty`).
Work is what the cell sees: samples, summed over its calls. torchdeq goes on until all samples are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib import Solution, Stopping
from deqlib.counting import CountedCell
from deqlib.testing import Problem, mixed_difficulty

from ..case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Settings, Table, none_of
from ..maps import solve
from ..measure import interleaved, marked, milliseconds, ratio
from ..rows import by_contender, distinct, grouped, having
from ..show import COLORS, legend_below
from .solvers.contenders import CONTENDERS, ROUNDING, SOLVERS

RTOL = 1e-4
MAX_EVALUATIONS = 2001
EASY, HARD = 0.3, 0.955  # rates
STEPS_RATIO = 20.0  # how much longer a hard sample must take for the bar
WORK_LIMIT = 0.35
BARRED = {"solver": "Picard", "batch": 32, "hard": 1}  # the point that has the bar
OTHERS = ("compact", "torchdeq")  # whose costs are divided by those of `plain`


def build(run: Run, solver: str, batch: int, hard: int, width: int) -> list[Row]:
    """Work and time of deqlib with and without `compact`, and of torchdeq."""
    problem = _problem(run, batch, hard, width)
    with torch.no_grad():
        rows = [_row(problem, name, solver, hard) for name in ("plain", *OTHERS)]
        solves = {row["contender"]: partial(_value, problem, row["contender"], solver) for row in rows}
        times = interleaved(solves, run.rounds)
    return [{**row, "seconds": times[row["contender"]]} for row in rows]


def _problem(run: Run, batch: int, hard: int, width: int) -> Problem:
    problem = mixed_difficulty(batch=batch, num_hard=hard, width=width, easy=EASY, hard=HARD)
    return problem.to(device=run.device)


def _row(problem: Problem, contender: str, solver: str, hard: int) -> Row:
    """One solve, counted."""
    cell, steps = CountedCell(problem.cell), torch.zeros(0)
    counted = replace(problem, cell=cell)
    if contender == "torchdeq":
        value = _value(counted, contender, solver)
    else:
        solution = _solution(counted, contender, solver)
        value, steps = solution.value, solution.num_steps
    easy = len(problem.z0) - hard
    return {
        "contender": contender,
        "work": cell.samples,
        "evaluations": cell.evaluations,
        "reached": bool(problem.residuals(value)[1].max() <= ROUNDING * RTOL),
        # Of the slowest of its kind; torchdeq does not tell samples apart.
        "steps_easy": int(steps[:easy].max()) if len(steps[:easy]) else None,
        "steps_hard": int(steps[easy:].max()) if len(steps[easy:]) else None,
    }


def _value(problem: Problem, contender: str, solver: str) -> Tensor:
    if contender == "torchdeq":
        return CONTENDERS[f"torchdeq {solver}"](problem, RTOL, MAX_EVALUATIONS)
    value: Tensor = _solution(problem, contender, solver).value
    return value


def _solution(problem: Problem, contender: str, solver: str) -> Solution:
    rule = Stopping(rtol=RTOL, max_steps=MAX_EVALUATIONS - 1, patience=None)
    # Inputs and rates are cut; the basis is shared, and may have as many rows as the batch has samples.
    compact = (0, 0, None) if contender == "compact" else False
    return solve(problem, SOLVERS[solver], rule, compact=compact)


def _profiled(run: Run, solver: str, batch: int, hard: int, width: int) -> Callable[[], object]:
    problem = _problem(run, batch, hard, width)
    problem = replace(problem, cell=marked(problem.cell))
    return torch.no_grad()(partial(_solution, problem, "compact", solver))


def _points(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows of one point by contender."""
    return [by_contender(point) for point in grouped(rows, "solver", "batch", "hard", "width")]


def bars(rows: list[Row]) -> list[Bar]:
    """The work counts only if the hard sample is as hard as is said, and all arrive."""
    more, value, note = [], math.nan, ""
    for point in _points(rows):
        plain, compact = point["plain"], point["compact"]
        if compact["work"] > plain["work"]:
            label = f"{plain['solver']}, {plain['hard']} hard of {plain['batch']}"
            more.append(f"{label}: {compact['work']} > {plain['work']}")
        if all(plain[name] == wanted for name, wanted in BARRED.items()):
            times = plain["steps_hard"] / plain["steps_easy"]
            arrived = plain["reached"] and compact["reached"]
            value = compact["work"] / plain["work"] if arrived and times >= STEPS_RATIO else math.inf
            note = f"steps {plain['steps_hard']} and {plain['steps_easy']}, ratio {times:.1f}"
    name = f"compact / plain, work of the cell, {BARRED['solver']}, one hard sample of {BARRED['batch']}"
    return [Bar(name, value, WORK_LIMIT, note), none_of("compact takes more work than plain", more)]


def ratios(point: dict[str, Row], contender: str) -> dict[str, float]:
    """Work and time of a contender over those of `plain`."""
    ours, plain = point[contender], point["plain"]
    return {"work": ours["work"] / plain["work"], "time": ratio(ours["seconds"], plain["seconds"])}


def table(rows: list[Row]) -> Table:
    """One line a point."""
    lines = []
    for point in _points(rows):
        plain = point["plain"]
        cells = [_steps(plain["steps_easy"]), _steps(plain["steps_hard"])]
        for name in OTHERS:
            text = " / ".join(f"{figure:.2f}" for figure in ratios(point, name).values())
            cells.append(text if point[name]["reached"] else f"({text})")
        cells.append(f"{plain['work']:,} / {milliseconds(plain['seconds'])}")
        lines.append((f"{plain['solver']}, {plain['hard']} of {plain['batch']}", *cells))
    head = ("solver, hard samples", "steps, easy", "steps, hard", *OTHERS, "plain: work / ms")
    return Table("work / time over those of plain; in brackets where not all samples arrive", head, lines)


def _steps(steps: int | None) -> str:
    return "-" if steps is None else str(steps)


_WHAT = ("work", "time")


def _panels(rows: list[Row]) -> list[str]:
    return [f"{solver}, {what}" for solver in distinct(rows, "solver") for what in _WHAT]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    pairs = [(solver, what) for solver in distinct(rows, "solver") for what in _WHAT]
    for axis, (solver, what) in zip(axes, pairs, strict=True):
        for batch, color in zip(distinct(rows, "batch"), COLORS, strict=False):
            found = _points(having(rows, solver=solver, batch=batch))
            shares = [point["plain"]["hard"] / batch for point in found]
            for name, dashes in zip(OTHERS, ("o-", "x--"), strict=True):
                values = [ratios(point, name)[what] for point in found]
                axis.plot(shares, values, dashes, color=color, label=f"{name}, batch {batch}", linewidth=1.2)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="share of hard samples", ylabel=f"{what} / plain", ylim=(0, None))
    legend_below(axes, 3)


def _grid(
    solvers: Iterable[str], batches: Iterable[int], shares: Iterable[float], width: int
) -> list[Settings]:
    """Of every batch the same shares, at least one sample."""
    return [
        {"solver": solver, "batch": batch, "hard": hard, "width": width}
        for solver in solvers
        for batch in batches
        for hard in dict.fromkeys(math.ceil(share * batch) for share in shares)
    ]


CASES = (
    Case(
        "compaction",
        "work and time with and without `compact`, by the share of hard samples",
        build,
        grid=_grid(("Picard", "Anderson"), (8, 32, 128), (0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1), 1024),
        quick=_grid(("Picard", "Anderson"), (8, 32), (0, 1 / 32, 1 / 2), 64),
        metrics={
            "work": COUNT,
            "evaluations": COUNT,
            "reached": Metric("higher"),
            "steps_easy": COUNT,
            "steps_hard": COUNT,
            "seconds": SECONDS,
        },
        table=table,
        bars=bars,
        picture=Picture(_paint, _panels, columns=2, size=(4.8, 3.2)),
        solve=_profiled,
    ),
)

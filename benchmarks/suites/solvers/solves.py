"""Evaluations, success and time of everybody's solvers on problems with known answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib.counting import CountedCell
from deqlib.testing import Problem

from ... import maps
from ...case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, none_of, product, worst_of
from ...measure import geometric_mean, interleaved, marked, milliseconds, ratio, seconds
from ...rows import by_contender, distinct, grouped, having
from ...show import legend_below, pivot
from .contenders import CONTENDERS, ONCE, ROUNDING, head, not_run, style

TOLERANCES = (1e-3, 1e-5)
LARGE = 100_000  # numbers of a batch from which on Broyden has a bar of its own
FARTHEST = 16  # times the best, in the picture


def build(run: Run, problem: str, rtol: float, max_evaluations: int) -> list[Row]:
    """All contenders on one problem. The round that counts evaluations warms up."""
    subject = maps.named(problem, run.device)
    with torch.no_grad():
        rows = [_row(subject, rtol, name, max_evaluations) for name in CONTENDERS]
        able = [row for row in rows if row["error"] is None]
        solves = {
            row["contender"]: partial(CONTENDERS[row["contender"]], subject, rtol, max_evaluations)
            for row in able
        }
        first = {row["contender"]: row["seconds"][0] for row in able}
        times = interleaved(solves, run.rounds, limit=ONCE, warm_up=first)
    for row in able:
        row["seconds"] = times[row["contender"]]
    return rows


def _row(problem: Problem, rtol: float, name: str, evaluations: int) -> Row:
    """One solve, counted; None where there is no figure."""
    row: Row = {
        "contender": name,
        "numbers": problem.z0.numel(),
        "evaluations": None,
        "relative_residual": None,  # worst of the samples, recomputed at the value returned
        "reached": None,
        "seconds": [],
        "error": not_run(name, problem),
    }
    if row["error"] is not None:
        return row
    cell, found = CountedCell(problem.cell), list[Tensor]()

    def attempt() -> None:
        # A contender that raises fails on this problem; the others are still measured.
        try:
            found.append(CONTENDERS[name](replace(problem, cell=cell), rtol, evaluations))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"

    row["seconds"] = [seconds(attempt)]
    worst = float(problem.residuals(found[0])[1].max()) if found else math.nan
    row |= {
        "evaluations": cell.evaluations,
        "relative_residual": worst if math.isfinite(worst) else None,
        "reached": worst <= ROUNDING * rtol,
    }
    return row


def profiled(run: Run, problem: str, rtol: float, max_evaluations: int) -> Callable[[], object]:
    """A solve by the default solver."""
    subject = maps.named(problem, run.device)
    subject = replace(subject, cell=marked(subject.cell))
    return torch.no_grad()(partial(CONTENDERS["deqlib Auto"], subject, rtol, max_evaluations))


Solves = dict[str, dict[str, Row]]  # by problem and tolerance, by contender


def by_solve(rows: Iterable[Row]) -> Solves:
    """Rows of everybody who was measured."""
    return {_solve_of(point[0]): by_contender(point) for point in grouped(rows, "problem", "rtol")}


def _solve_of(row: Row) -> str:
    return f"{row['problem']} {row['rtol']:.0e}"


def bars(rows: list[Row]) -> list[Bar]:
    """What the rows say about deqlib."""
    solves = by_solve(rows)
    raised = [
        f"{solve}, {name}: {row['error']}"
        for solve, found in solves.items()
        for name, row in found.items()
        if row["error"] and name.startswith("deqlib")
    ]
    return [
        none_of("solves of deqlib that raise", raised),
        *_anderson_bars(solves),
        *_broyden_bars(solves),
        *_auto_bars(solves),
    ]


def _both(solves: Solves, solver: str) -> dict[str, float]:
    """Time over torchdeq's same solver, where both arrive."""
    pairs = {solve: (rows[f"deqlib {solver}"], rows[f"torchdeq {solver}"]) for solve, rows in solves.items()}
    return {
        solve: ratio(a["seconds"], b["seconds"])
        for solve, (a, b) in pairs.items()
        if a["reached"] and b["reached"]
    }


def _mean_bar(name: str, ratios: dict[str, float], limit: float) -> Bar:
    return Bar(
        f"{name}, time, geometric mean",
        geometric_mean(ratios.values()),
        limit,
        f"{len(ratios)} solve{'s' * (len(ratios) != 1)}",
    )


def _lost(solves: Solves, solver: str) -> Bar:
    lost = [
        solve
        for solve, rows in solves.items()
        if rows[f"torchdeq {solver}"]["reached"] and not rows[f"deqlib {solver}"]["reached"]
    ]
    return none_of(f"torchdeq {solver} arrives, deqlib's does not", lost)


def _broyden_bars(solves: Solves) -> list[Bar]:
    ratios = _both(solves, "Broyden")
    large = {
        solve: found for solve, found in ratios.items() if solves[solve]["deqlib Broyden"]["numbers"] >= LARGE
    }
    name = "deqlib / torchdeq Broyden where both arrive"
    return [
        _mean_bar(name, ratios, 0.25),
        _mean_bar(f"{name}, {LARGE:,} numbers and more", large, 0.15),
        _lost(solves, "Broyden"),
    ]


def _anderson_bars(solves: Solves) -> list[Bar]:
    more, slower, unsolved = [], [], []
    for solve, rows in solves.items():
        ours, theirs, picard = (
            rows[name] for name in ("deqlib Anderson", "torchdeq Anderson", "deqlib Picard")
        )
        allowed = theirs["evaluations"] if theirs["reached"] else ours["max_evaluations"]
        if ours["reached"] and ours["evaluations"] > allowed:
            more.append(f"{solve}: {ours['evaluations']} > {allowed}")
        if picard["reached"] and not ours["reached"]:
            unsolved.append(solve)
        elif picard["reached"] and ours["evaluations"] > picard["evaluations"] + 2:
            slower.append(f"{solve}: {ours['evaluations']} > {picard['evaluations']} + 2")
    ratios = _both(solves, "Anderson")
    name = "deqlib / torchdeq Anderson where both arrive"
    return [
        _mean_bar(name, ratios, 0.57),
        worst_of(f"{name}, time", ratios, 0.9),
        _lost(solves, "Anderson"),
        none_of("Anderson needs more evaluations than torchdeq's", more),
        none_of("Anderson needs more evaluations than Picard + 2", slower),
        none_of("Picard arrives, Anderson does not", unsolved),
    ]


def _auto_bars(solves: Solves) -> list[Bar]:
    """Against whoever is best on each problem: scipy, which sees one vector, aside."""
    unsolved, more, ratios, peers = [], [], {}, {}
    for solve, rows in solves.items():
        auto = rows["deqlib Auto"]
        others = {
            name: row
            for name, row in rows.items()
            if row["reached"] and name != "deqlib Auto" and not name.startswith("scipy")
        }
        if others and not auto["reached"]:
            unsolved.append(f"{solve}, which {', '.join(others)} reach")
        if not (others and auto["reached"]):
            continue
        fewest = min(row["evaluations"] for row in others.values())
        if auto["evaluations"] > 1.5 * fewest + 10:
            more.append(f"{solve}: {auto['evaluations']}, not {fewest}")
        fastest = min(others, key=lambda name: statistics.median(others[name]["seconds"]))
        ratios[f"{solve}, {fastest}"] = ratio(auto["seconds"], others[fastest]["seconds"])
        theirs = [row["seconds"] for name, row in others.items() if name.startswith("torchdeq")]
        if theirs:
            peers[solve] = ratio(auto["seconds"], min(theirs, key=statistics.median))
    return [
        none_of("some solver arrives, Auto does not", unsolved),
        none_of("Auto needs more than 1.5 times the fewest evaluations of any solver + 10", more),
        worst_of("Auto / the fastest solver of each problem, time", ratios, 1.25),
        _mean_bar("Auto / the fastest solver of each problem", ratios, 1.25),
        _mean_bar("Auto / torchdeq's fastest solver of each problem", peers, 0.45),
    ]


def table(rows: list[Row]) -> Table:
    """One line a problem and tolerance."""
    title = "evaluations / ms, in brackets where the tolerance was not reached, - where nobody tried"
    return pivot(title, rows, "problem, tolerance", _solve_of, head, _cell)


def _cell(row: Row) -> str:
    if row["evaluations"] is None:
        return "-"
    if row["error"] is not None:
        return "raised"
    text = f"{row['evaluations']} / {milliseconds(row['seconds'])}"
    return text if row["reached"] else f"({text})"


_COSTS: dict[str, Callable[[Row], float]] = {
    "evaluations": lambda row: float(row["evaluations"]),
    "time": lambda row: statistics.median(row["seconds"]),
}


def factors(rows: Iterable[Row], cost: str) -> dict[str, list[float]]:
    """By contender, its cost over that of the cheapest who arrived; infinite where it did not arrive.

    Problems that nobody solves, and those that a contender did not try, are left out.
    """
    found: dict[str, list[float]] = {}
    for contenders in by_solve(rows).values():
        costs = {name: _COSTS[cost](row) for name, row in contenders.items() if row["reached"]}
        for name, row in contenders.items():
            if costs and row["reached"] is not None:
                found.setdefault(name, []).append(costs.get(name, math.inf) / min(costs.values()))
    return found


def _panels(rows: list[Row]) -> list[str]:
    return [f"{cost} to a residual of {rtol:.0e}" for rtol in distinct(rows, "rtol") for cost in _COSTS]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Performance profiles (Dolan & Moré 2002): share of problems solved at so many times the least cost."""
    pairs = [(rtol, cost) for rtol in distinct(rows, "rtol") for cost in _COSTS]
    for axis, (rtol, cost) in zip(axes, pairs, strict=True):
        for name, values in factors(having(rows, rtol=rtol), cost).items():
            near = sorted(value for value in values if value <= FARTHEST)
            shares = [(index + 1) / len(values) for index in range(len(near))]
            axis.step([1, *near, FARTHEST], [0, *shares, max(shares, default=0)], where="post", **style(name))
        axis.set(xscale="log", xlim=(1, FARTHEST), ylim=(0, 1.02), xlabel=f"{cost}, times the best")
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.set_ylabel("share of problems")
    legend_below(axes, 4)


CASE = Case(
    "solves",
    "evaluations, success and time of every solver on every problem",
    build,
    grid=product(problem=maps.SOLVED, rtol=TOLERANCES, max_evaluations=[maps.MAX_EVALUATIONS]),
    quick=product(problem=maps.QUICK, rtol=TOLERANCES[:1], max_evaluations=[60]),
    metrics={
        "numbers": Metric(better=None),
        "evaluations": COUNT,
        "relative_residual": Metric(better=None),
        "reached": Metric("higher"),
        "seconds": SECONDS,
        "error": Metric(better=None),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, _panels, columns=2, size=(4.8, 3.2)),
    solve=profiled,
)

"""What a solver takes outside of its cell: time and kernels a step, on a state of a million numbers.

The cell is linear with a spectrum that is known: it turns the state by an orthogonal matrix so many times,
multiplies by rates, and turns it back. The turns change nothing of how fast a solver converges, so that the
cell can be made to take whatever time is wanted; 0 ms is a cell without turns, beside which all is solver.

Full size is for a GPU; on a CPU a single turn would take a hundred times the cell that is wanted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib import Anderson, Broyden, Picard, Solver
from deqlib.counting import CountedCell
from deqlib.testing import Problem

from ...baselines import torchdeq
from ...case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product
from ...maps import solve
from ...measure import interleaved, marked, milliseconds, num_kernels, ratios, seconds
from ...rows import by_contender, grouped, having
from ...show import COLORS, listing
from .contenders import ROUNDING, not_run, stopping

BARE = "bare loop"
MEMORY = 5  # columns of everybody's history
FASTEST, SLOWEST = 0.0, 0.97  # rates: Picard needs hundreds of steps to 1e-5, the others some thirty
STEPS = 8  # that kernels are counted over, twice; later some solver would have arrived, and do other things
SHARE, PEER, KERNELS = 0.15, 0.5, 6  # bars: time outside / in the cell, time / torchdeq's, kernels a step
POINT = ("cell_ms", "batch", "tokens", "width", "rtol")

Contender = Callable[[Problem, float, int], Tensor]  # problem, rtol, evaluations allowed -> value


def _ours(solver: Solver, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    value: Tensor = solve(problem, solver, stopping(rtol, evaluations)).value
    return value


CONTENDERS: dict[str, Contender] = {
    "deqlib Picard": partial(_ours, Picard()),
    "deqlib Anderson": partial(_ours, Anderson(memory=MEMORY)),
    "deqlib Broyden": partial(_ours, Broyden(memory=MEMORY)),
    "torchdeq Anderson": partial(torchdeq.solve, "Anderson", m=MEMORY),
    "torchdeq Broyden": partial(torchdeq.solve, "Broyden"),  # which does not arrive with as few
}
JUDGED = ("Anderson", "Broyden")


def build(
    run: Run, cell_ms: float, batch: int, tokens: int, width: int, rtol: float, max_evaluations: int
) -> Iterator[Row]:
    """Seconds of whole solves, and kernels a step outside of the cell.

    Args:
        run: where; no rows for more than one token if the device is no GPU.
        cell_ms: milliseconds that an evaluation should take.
        batch: samples.
        tokens: of a sample.
        width: of a token; a sample has tokens x width numbers.
        rtol: relative residual to reach.
        max_evaluations: that everybody may take.
    """
    if tokens > 1 and run.device.type != "cuda":
        return
    with torch.no_grad():
        problem = turning(run.device, cell_ms, batch, tokens, width)
        rows = {name: _row(name, problem, rtol, max_evaluations) for name in CONTENDERS}
        able = [name for name, row in rows.items() if row["error"] is None]
        evaluations = max(rows[name]["evaluations"] for name in able)
        tasks: dict[str, Callable[[], object]] = {BARE: partial(_loop, problem, evaluations)}
        for name in able:
            tasks[name] = partial(CONTENDERS[name], problem, rtol, max_evaluations)
        times = interleaved(tasks, run.rounds)
        inside = num_kernels(partial(_loop, problem, 1), run.device)
        for name in able:
            rows[name]["kernels"] = _kernels_a_step(name, problem) - inside
    nothing = dict.fromkeys(("relative_residual", "reached", "kernels", "error"))
    yield {
        "contender": BARE,
        **nothing,
        "evaluations": evaluations,
        "seconds": times[BARE],
        "kernels": inside,
    }
    for name, row in rows.items():
        yield {"contender": name, **row, "seconds": times.get(name, [])}


def turning(device: torch.device, cell_ms: float, batch: int, tokens: int, width: int) -> Problem:
    """The problem whose cell takes `cell_ms` on this device, or a little less than one turn more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, width, generator=generator).to(device)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.contiguous().to(device)
    rates = torch.linspace(FASTEST, SLOWEST, width, device=device)
    problem = Problem("turning", _Turning(0), torch.zeros_like(x), (x, turn, rates), None)
    if cell_ms == 0:
        return problem
    trial = replace(problem, cell=_Turning(32))
    _loop(trial, 1)
    one = statistics.median(seconds(partial(_loop, trial, 4)) for _ in range(3)) / (4 * 32)
    return replace(problem, cell=_Turning(max(1, round(cell_ms / 1e3 / one))))


class _Turning:
    """x + T^-n (rates (T^n z)), T orthogonal."""

    def __init__(self, num_turns: int) -> None:
        self.num_turns = num_turns

    def __call__(self, z: Tensor, x: Tensor, turn: Tensor, rates: Tensor) -> Tensor:
        for _ in range(self.num_turns):
            z = z @ turn
        z = z * rates if self.num_turns else torch.addcmul(x, z, rates)
        for _ in range(self.num_turns):
            z = z @ turn.t()
        return x + z if self.num_turns else z


def _loop(problem: Problem, evaluations: int) -> Tensor:
    z = problem.z0
    for _ in range(evaluations):
        z = problem.f(z)
    return z


def _row(name: str, problem: Problem, rtol: float, max_evaluations: int) -> Row:
    """One solve, counted; None where there is no figure."""
    row: Row = dict.fromkeys(("evaluations", "relative_residual", "reached", "kernels", "error"))
    row["error"] = not_run(name, problem)
    if row["error"] is not None:
        return row
    cell = CountedCell(problem.cell)
    try:
        value = CONTENDERS[name](replace(problem, cell=cell), rtol, max_evaluations)
    except Exception as error:  # this contender fails; the others are still measured
        return {**row, "evaluations": cell.evaluations, "error": f"{type(error).__name__}: {error}"}
    worst = float(problem.residuals(value)[1].max())
    return {
        **row,
        "evaluations": cell.evaluations,
        "relative_residual": worst if math.isfinite(worst) else None,
        "reached": worst <= ROUNDING * rtol,
    }


def _kernels_a_step(name: str, problem: Problem) -> float:
    """Cell and all, by the difference of two solves: what a solve begins and ends with is no step's."""
    counts = []
    for evaluations in (STEPS + 1, 2 * STEPS + 1):
        limited = partial(CONTENDERS[name], problem, 1e-30, evaluations)
        limited()
        counts.append(num_kernels(limited, problem.z0.device))
    return (counts[1] - counts[0]) / STEPS


def profiled(
    run: Run, cell_ms: float, batch: int, tokens: int, width: int, rtol: float, max_evaluations: int
) -> Callable[[], object]:
    """A solve by Anderson."""
    problem = turning(run.device, cell_ms, batch, tokens, width)
    subject = replace(problem, cell=marked(problem.cell))
    return torch.no_grad()(partial(CONTENDERS["deqlib Anderson"], subject, rtol, max_evaluations))


def cell_seconds(point: dict[str, Row]) -> list[float]:
    """Of one evaluation, in every round."""
    return [time / point[BARE]["evaluations"] for time in point[BARE]["seconds"]]


def outside(row: Row, point: dict[str, Row]) -> float:
    """Time outside of the cell / in it."""
    cells = statistics.median(ratios(row["seconds"], cell_seconds(point)))
    return cells / int(row["evaluations"]) - 1


def bars(rows: list[Row]) -> list[Bar]:
    """Of the full size with a costly cell, which a GPU alone has."""
    points = [by_contender(point) for point in grouped(having(rows, **FULL), *POINT)]
    found = points[0] if points else {}
    judged = []
    for solver in JUDGED:
        ours, theirs = (found.get(f"{library} {solver}") for library in ("deqlib", "torchdeq"))
        share = time = kernels = math.nan
        note = compared = ""
        if ours and ours["seconds"]:
            share, kernels = outside(ours, found), ours["kernels"]
            note = f"{1e3 * statistics.median(cell_seconds(found)):.2f} ms a cell"
        if ours and theirs and ours["reached"] and theirs["seconds"]:
            time = statistics.median(ratios(ours["seconds"], theirs["seconds"]))
            compared = "" if theirs["reached"] else "torchdeq does not arrive: a bound"
        judged += [
            Bar(f"{solver}, a million numbers, time outside / in a cell of 1 ms", share, SHARE, note),
            Bar(f"{solver}, a million numbers, time / torchdeq's", time, PEER, compared),
            Bar(f"{solver}, a million numbers, kernels a step outside of the cell", kernels, KERNELS),
        ]
    return judged


def table(rows: list[Row]) -> Table:
    """One line a contender and cell."""
    points = {id(row): by_contender(point) for point in grouped(rows, *POINT) for row in point}

    def step(row: Row) -> str:
        if not row["seconds"] or row["contender"] == BARE:
            return ""
        point = points[id(row)]
        share = outside(row, point)
        return f"{1e6 * share * statistics.median(cell_seconds(point)):,.0f} ({share:.0%})"

    def evaluations(row: Row) -> str:
        if row["evaluations"] is None:
            return "-"
        shown = "raised" if row["error"] else str(row["evaluations"])
        return f"({shown})" if row["reached"] is False else shown

    columns = {
        "solver": lambda row: f"{row['contender']}, cell of {row['cell_ms']:g} ms",
        "evaluations": evaluations,
        "ms": lambda row: milliseconds(row["seconds"]),
        "µs a step outside (of the cell's)": step,
        "kernels a step outside": lambda row: "" if row["kernels"] is None else f"{row['kernels']:g}",
    }
    return listing(f"solves to a tolerance, {MEMORY} columns of history", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, point in zip(axes, grouped(rows, *POINT), strict=True):
        found = by_contender(point)
        shown = [row for row in point if row["seconds"] and row["contender"] != BARE][::-1]
        inside = statistics.median(cell_seconds(found))
        names = [row["contender"] for row in shown]
        times = [1e6 * inside * outside(row, found) for row in shown]
        axis.barh(names, times, color=[COLORS[name.startswith("torchdeq")] for name in names])
        axis.set(xlabel="µs a step outside of the cell")


def _panels(rows: list[Row]) -> list[str]:
    return [f"cell of {point[0]['cell_ms']:g} ms" for point in grouped(rows, *POINT)]


FULL = {"cell_ms": 1.0, "batch": 64, "tokens": 16, "width": 1024}
_USUAL = {"rtol": 1e-5, "max_evaluations": 120}
CASE = Case(
    "outside",
    "time and kernels a step outside of the cell, a state of a million numbers, torchdeq's beside",
    build,
    grid=[{**FULL, **_USUAL}, {**FULL, **_USUAL, "cell_ms": 0.0}],
    quick=product(cell_ms=[0.1, 0.0], batch=[4], tokens=[1], width=[64], rtol=[1e-2], max_evaluations=[20]),
    metrics={
        "evaluations": COUNT,
        "relative_residual": Metric(better=None),
        "reached": Metric("higher"),
        "kernels": COUNT,
        "seconds": SECONDS,
        "error": Metric(better=None),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, _panels, columns=2, size=(5.2, 2.6)),
    solve=profiled,
)

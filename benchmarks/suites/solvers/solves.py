"""Evaluations, success and time of deqlib's solvers and torchdeq's on problems with known answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from deqlib.testing import Problem

from ...contenders import CONTENDERS, Contender
from ...report import Bar, none_of
from ...timing import geometric_mean, interleaved, ratio

TOLERANCES = (1e-3, 1e-5)
ROUNDING = 1.001  # what a residual may exceed its tolerance by when it is computed anew
ONCE = 20.0  # seconds; a solve that takes longer is timed once


@dataclass(frozen=True)
class Row:
    """One contender on one problem to one tolerance; None where there is no figure."""

    problem: str
    rtol: float
    contender: str
    evaluations: int
    relative_residual: float | None  # worst of the samples, recomputed at the value returned
    reached: bool
    seconds: float
    times: list[float]
    error: str | None

    @property
    def case(self) -> str:
        """Problem and tolerance."""
        return f"{self.problem} {self.rtol:.0e}"


class Counted:
    """A cell that counts its calls."""

    def __init__(self, cell: Callable[..., Tensor]) -> None:
        self.cell, self.count = cell, 0

    def __call__(self, z: Tensor, *inputs: Any) -> Tensor:
        """The cell."""
        self.count += 1
        return self.cell(z, *inputs)


def measure(problems: list[Problem], rounds: int, max_steps: int, once: float = ONCE) -> list[Row]:
    """All contenders on all problems to all tolerances, with `max_steps + 1` evaluations each.

    Who takes longer than `once` seconds in the round that counts evaluations is not run again.
    """
    cases = [(problem, rtol) for problem in problems for rtol in TOLERANCES]
    with torch.no_grad():
        return [
            row
            for problem, rtol in track(cases, "solves")
            for row in _case(problem, rtol, rounds, max_steps + 1, once)
        ]


def _case(problem: Problem, rtol: float, rounds: int, evaluations: int, once: float) -> list[Row]:
    """All contenders on one problem. The round that counts evaluations warms up."""
    rows = [_counted(problem, rtol, name, evaluations) for name in CONTENDERS]
    runs = {
        row.contender: partial(CONTENDERS[row.contender], problem, rtol, evaluations)
        for row in rows
        if row.error is None
    }
    first = {row.contender: row.seconds for row in rows}
    times = interleaved(runs, rounds, limit=once, warm_up=first)
    taken = [times.get(row.contender, row.times) for row in rows]
    return [replace(row, times=t, seconds=statistics.median(t)) for row, t in zip(rows, taken, strict=True)]


def _counted(problem: Problem, rtol: float, name: str, evaluations: int) -> Row:
    cell, solve = Counted(problem.cell), CONTENDERS[name]
    start = time.perf_counter()
    value, error = _attempt(solve, replace(problem, cell=cell), rtol, evaluations)
    elapsed = time.perf_counter() - start
    worst = math.nan if value is None else float(problem.residuals(value)[1].max())
    return Row(
        problem=problem.name,
        rtol=rtol,
        contender=name,
        evaluations=cell.count,
        relative_residual=worst if math.isfinite(worst) else None,  # JSON has no NaN
        reached=worst <= ROUNDING * rtol,
        seconds=elapsed,
        times=[elapsed],
        error=error,
    )


def _attempt(
    solve: Contender, problem: Problem, rtol: float, evaluations: int
) -> tuple[Tensor | None, str | None]:
    """The value, or what was raised: a contender that raises loses its case, not everybody's."""
    try:
        return solve(problem, rtol, evaluations), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def bars(rows: list[Row], max_steps: int) -> list[Bar]:
    """What the rows say about the contenders."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.contender] = row
    return [
        none_of("solves of deqlib that raise", [_raised(r) for r in rows if r.error and _is_ours(r)]),
        *_time_bars(cases, "Anderson", 0.5),
        *_anderson_bars(cases, max_steps),
        *_auto_bars(cases),
        *_time_bars(cases, "Broyden", 0.15),
    ]


def _raised(row: Row) -> str:
    return f"{row.case}, {row.contender}: {row.error}"


def _is_ours(row: Row) -> bool:
    return row.contender.startswith("deqlib")


def _time_bars(cases: dict[str, dict[str, Row]], solver: str, limit: float) -> list[Bar]:
    """Time ratios to torchdeq. Where it does not arrive, its time is a lower bound of what it needs."""
    pairs = {case: (rows[f"deqlib {solver}"], rows[f"torchdeq {solver}"]) for case, rows in cases.items()}
    ratios = {case: ratio(a.times, b.times) for case, (a, b) in pairs.items()}
    both = [ratios[case] for case, (a, b) in pairs.items() if a.reached and b.reached]
    missed = [case for case, (a, _) in pairs.items() if not a.reached]
    lost = [case for case, (a, b) in pairs.items() if b.reached and not a.reached]
    bounds = [case for case, (_, b) in pairs.items() if not b.reached]
    worst = max(ratios, key=lambda case: ratios[case])
    return [
        Bar(
            f"deqlib / torchdeq {solver}, time, geometric mean",
            geometric_mean(ratios.values()),
            limit,
            f"lower bounds (torchdeq does not arrive): {', '.join(bounds) or 'none'}; "
            f"deqlib does not arrive: {', '.join(missed) or 'none'}",
        ),
        Bar(
            f"deqlib / torchdeq {solver}, time, geometric mean where both arrive",
            geometric_mean(both),
            limit,
            f"{len(both)} of {len(ratios)} cases",
        ),
        Bar(f"deqlib / torchdeq {solver}, time, worst", ratios[worst], 1.0, worst),
        none_of(f"torchdeq {solver} arrives, deqlib's does not", lost),
    ]


def _anderson_bars(cases: dict[str, dict[str, Row]], max_steps: int) -> list[Bar]:
    more, slower, unsolved = [], [], []
    for case, rows in cases.items():
        ours, theirs, picard = rows["deqlib Anderson"], rows["torchdeq Anderson"], rows["deqlib Picard"]
        allowed = theirs.evaluations if theirs.reached else max_steps + 1
        if ours.reached and ours.evaluations > allowed:
            more.append(f"{case}: {ours.evaluations} > {allowed}")
        if picard.reached and not ours.reached:
            unsolved.append(case)
        elif picard.reached and ours.evaluations > picard.evaluations + 2:
            slower.append(f"{case}: {ours.evaluations} > {picard.evaluations} + 2")
    return [
        none_of("Anderson needs more evaluations than torchdeq's", more),
        none_of("Anderson needs more evaluations than Picard + 2", slower),
        none_of("Picard arrives, Anderson does not", unsolved),
    ]


def _auto_bars(cases: dict[str, dict[str, Row]]) -> list[Bar]:
    unsolved, different = [], []
    for case, rows in cases.items():
        auto, anderson = rows["deqlib Auto"], rows["deqlib Anderson"]
        others = [row.contender for row in rows.values() if row.reached]
        if auto.rtol == min(TOLERANCES) and others and not auto.reached:
            unsolved.append(f"{case}, which {', '.join(others)} reach")
        if anderson.reached and auto.evaluations != anderson.evaluations:
            different.append(f"{case}: {auto.evaluations}, not {anderson.evaluations}")
    return [
        none_of(f"some solver arrives at {min(TOLERANCES):.0e}, Auto does not", unsolved),
        none_of("Anderson arrives, Auto takes another number of evaluations", different),
    ]


def table(rows: list[Row]) -> Table:
    """Evaluations and milliseconds; a case that did not arrive is in brackets."""
    shown = Table(title="evaluations / ms, in brackets where the tolerance was not reached", show_lines=True)
    shown.add_column("problem")
    names = list(dict.fromkeys(row.contender for row in rows))
    for name in names:
        shown.add_column(name.replace(" ", "\n"), justify="right")
    cells = {(row.case, row.contender): _cell(row) for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        shown.add_row(case, *(cells[case, name] for name in names))
    return shown


def _cell(row: Row) -> str:
    if row.error is not None:
        return "raised"
    text = f"{row.evaluations}\n{row.seconds * 1e3:,.1f}"
    return text if row.reached else f"({text})"


def record(rows: list[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in rows]

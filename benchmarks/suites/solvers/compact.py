"""What it saves to let finished samples leave the batch, where one of them is hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from deqlib import Picard, Solution, Stopping, fixed_point
from deqlib.testing import Problem, mixed_difficulty

from ...report import Bar
from ...timing import interleaved, ratio

STEPS_RATIO = 20.0  # how much longer the hard sample takes
WORK_LIMIT = 0.35


def measure(rounds: int, width: int = 64, wide: int = 1024) -> dict[str, Any]:
    """Steps of the hard sample over those of the others, work of the cell and time with over without.

    Args:
        rounds: of timing; with 0 nothing is timed.
        width: of the cell whose work is counted.
        wide: of the cell that is timed.
    """
    with torch.no_grad():
        plain, compact = (_solver(_problem(width), compact)() for compact in (False, True))
        steps = plain.num_steps
        found: dict[str, Any] = {
            "steps": [int(steps[:-1].max()), int(steps[-1])],
            "steps_ratio": float(steps[-1] / steps[:-1].max()),
            "work": [int(compact.sample_nfe.sum()), int(plain.sample_nfe.sum())],
            "work_ratio": float(compact.sample_nfe.sum() / plain.sample_nfe.sum()),
            "all_converged": bool(plain.converged.all() and compact.converged.all()),
        }
        if rounds:
            problem = _problem(wide)
            times = interleaved({"compact": _solver(problem, True), "plain": _solver(problem, False)}, rounds)
            found |= {"time_ratio": ratio(times["compact"], times["plain"]), "times": times, "wide": wide}
    return found


def _problem(width: int) -> Problem:
    return mixed_difficulty(batch=32, num_hard=1, width=width, easy=0.3, hard=0.955)


def _solver(problem: Problem, compact: bool) -> Callable[[], Solution]:
    rule = Stopping(rtol=1e-4, max_steps=2000, patience=None)
    axes = (0, 0, None) if compact else False  # of inputs, rates and basis: the last is shared
    return lambda: fixed_point(
        problem.cell,
        problem.z0,
        problem.inputs,
        solver=Picard(),
        stopping=rule,
        on_failure="ignore",
        compact=axes,
    )


def bars(row: dict[str, Any]) -> list[Bar]:
    """The work counts only if the hard sample is as hard as is said."""
    short = row["steps_ratio"] < STEPS_RATIO or not row["all_converged"]
    easy, hard = row["steps"]
    return [
        Bar(
            "compact / plain, work of the cell",
            math.inf if short else row["work_ratio"],
            WORK_LIMIT,
            f"steps {hard} and {easy}, ratio {row['steps_ratio']:.1f}",
        )
    ]


def table(row: dict[str, Any]) -> Table:
    """Ratios."""
    shown = Table(title="compact / plain, one hard sample of 32")
    for column in ("steps, easy", "steps, hard", "work of the cell", "time, wide cell"):
        shown.add_column(column, justify="right")
    time_ratio = f"{row['time_ratio']:.2f}" if "time_ratio" in row else "-"
    shown.add_row(*map(str, row["steps"]), f"{row['work_ratio']:.3f}", time_ratio)
    return shown

"""What a Picard solve takes beyond its evaluations: against a bare loop of as many, on costly cells.

A solve takes the steps that Picard needs to 1e-5, with a cap: beyond convergence no iterate is better than
the last, which is not what a solver does all day.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from deqlib import Picard, Solution, Stopping, fixed_point
from deqlib.testing import Problem

from ...report import Bar
from ...timing import interleaved, ratio, seconds

COSTLY = 2e-3  # seconds an evaluation must take
LIMITS = {"tracked": 1.15, "fixed": 1.03}


def measure(
    problems: list[Problem], rounds: int, steps: int, costly: float = COSTLY
) -> dict[str, dict[str, Any]]:
    """By problem: milliseconds an evaluation, evaluations, and the ratio to a bare loop of as many."""
    rows = {}
    with torch.no_grad():
        for problem in track(problems, "overhead"):
            evaluation = _evaluation(problem)
            if evaluation < costly:
                continue
            needed = int(_solver(problem, Stopping(rtol=1e-5, max_steps=steps))().num_steps.max())
            rules = {
                "tracked": Stopping(rtol=1e-30, max_steps=needed, patience=None),
                "fixed": Stopping.steps(needed),
            }
            evaluations = {name: _solver(problem, rule)().nfe for name, rule in rules.items()}
            contenders: dict[str, Callable[[], object]] = {}
            for name, rule in rules.items():
                contenders[name] = _solver(problem, rule)
                contenders[f"{name}, bare loop"] = _loop(problem, evaluations[name])
            times = interleaved(contenders, rounds)
            rows[problem.name] = {
                "evaluation_ms": evaluation * 1e3,
                "evaluations": evaluations,
                "ratios": {name: ratio(times[name], times[f"{name}, bare loop"]) for name in rules},
                "times": times,
            }
    return rows


def _evaluation(problem: Problem) -> float:
    """Seconds an evaluation takes."""
    problem.f(problem.z0)
    return statistics.median(seconds(lambda: problem.f(problem.z0)) for _ in range(5))


def _solver(problem: Problem, rule: Stopping) -> Callable[[], Solution]:
    return lambda: fixed_point(
        problem.cell, problem.z0, problem.inputs, solver=Picard(), stopping=rule, on_failure="ignore"
    )


def _loop(problem: Problem, evaluations: int) -> Callable[[], Tensor]:
    def loop() -> Tensor:
        z = problem.z0
        for _ in range(evaluations):
            z = problem.f(z)
        return z

    return loop


def bars(rows: dict[str, dict[str, Any]]) -> list[Bar]:
    """The worst cell decides."""
    found = []
    for name, limit in LIMITS.items():
        ratios = {problem: row["ratios"][name] for problem, row in rows.items()}
        worst = max(ratios, key=lambda problem: ratios[problem], default="no cell is costly enough")
        value = ratios.get(worst, math.nan)
        found.append(Bar(f"Picard / bare loop, time, {name}, worst", value, limit, worst))
    return found


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a cell."""
    shown = Table(title="Picard / bare loop of as many evaluations, time")
    for column in ("problem", "ms an evaluation", *LIMITS):
        shown.add_column(column, justify="left" if column == "problem" else "right")
    for name, row in rows.items():
        ratios = (f"{row['ratios'][kind]:.3f}" for kind in LIMITS)
        shown.add_row(name, f"{row['evaluation_ms']:.1f}", *ratios)
    return shown

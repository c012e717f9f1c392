"""Who is compared: deqlib's solvers and torchdeq's, each with the same budget of evaluations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Stopping, fixed_point
from deqlib.testing import Problem

with warnings.catch_warnings():
    # Its docstrings hold invalid escapes, of which Python tells when it compiles them.
    for category in (DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", "invalid escape sequence", category)
    from torchdeq.solver import anderson, broyden, fp_iter

Contender = Callable[[Problem, float, int], Tensor]  # problem, rtol, evaluations allowed -> value

# A peer's `max_iter` counts evaluations, but Broyden's leaves out the first.
_PEERS: dict[str, tuple[Any, int]] = {
    "Picard": (fp_iter.fixed_point_iter, 0),
    "Anderson": (anderson.anderson_solver, 0),
    "Broyden": (broyden.broyden_solver, 1),
}
SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}


def stopping(rtol: float, evaluations: int) -> Stopping:
    """deqlib's rule for at most so many evaluations."""
    return Stopping(rtol=rtol, max_steps=evaluations - 1, patience=50)


def _ours(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    rule = stopping(rtol, evaluations)
    value: Tensor = fixed_point(
        problem.cell,
        problem.z0,
        problem.inputs,
        solver=SOLVERS[name],
        stopping=rule,
        on_failure="ignore",
    ).value
    return value


def _theirs(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    solve, extra = _PEERS[name]
    value: Tensor = solve(problem.f, problem.z0, max_iter=evaluations - extra, tol=rtol, stop_mode="rel")[0]
    return value


CONTENDERS: dict[str, Contender] = {
    **{f"deqlib {name}": partial(_ours, name) for name in SOLVERS},
    **{f"torchdeq {name}": partial(_theirs, name) for name in _PEERS},
}

"""torchdeq 0.1: its solvers, and its layers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from deqlib.testing import Problem

with warnings.catch_warnings():
    # Its docstrings hold invalid escapes, of which Python tells when it compiles them.
    for category in (DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", "invalid escape sequence", category)
    import torchdeq

# By deqlib's names; `max_iter` counts evaluations, but Broyden's leaves out the first.
SOLVERS: dict[str, tuple[Any, int]] = {
    "Picard": (torchdeq.solver.fp_iter.fixed_point_iter, 0),
    "Anderson": (torchdeq.solver.anderson.anderson_solver, 0),
    "Broyden": (torchdeq.solver.broyden.broyden_solver, 1),
}


def solve(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    """The last iterate of a solver, a name of `SOLVERS`, that may evaluate so often."""
    solver, uncounted = SOLVERS[name]
    value: Tensor = solver(
        problem.f, problem.z0, max_iter=evaluations - uncounted, tol=rtol, stop_mode="rel"
    )[0]
    return value


def layer(settings: dict[str, Any], problem: Problem) -> Tensor:
    """The fixed point carrying gradient, of a layer with these settings; tolerances are relative."""
    deq = torchdeq.get_deq(f_stop_mode="rel", b_stop_mode="rel", **settings)
    values, _ = deq(problem.f, problem.z0)
    value: Tensor = values[-1]
    return value

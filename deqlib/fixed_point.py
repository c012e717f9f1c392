"""The functional entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ._checks import check_instance
from .backward import Backward, ImplicitDifferentiation
from .driver import iterate
from .solution import OnFailure, Solution, check_on_failure, report_failure
from .solvers import Anderson, Solver
from .state import Map, flatten
from .stopping import Stopping


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] = (),
    *,
    solver: Solver | None = None,
    stopping: Stopping | None = None,
    backward: Backward | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch.

    Args:
        f: `f(z, *args) -> z`, same structure, shapes, dtypes and device as `z0`. Samples must not depend
            on one another. Gradients reach everything f uses: `args`, parameters, captured tensors.
        z0: starting point, a floating-point tensor or pytree of tensors whose first axis is the batch.
        args: further arguments of `f`, passed as they are.
        solver: default `Anderson()`.
        stopping: default `Stopping()`: relative residual 1e-3 within 50 steps.
        backward: default `ImplicitDifferentiation()`.
        on_failure: "raise" throws `NonConvergenceError`, "warn" warns `NonConvergenceWarning`, "ignore"
            does neither; for the forward and for the adjoint solve.

    Returns:
        `Solution`, whose `value` has the structure of `z0` and carries gradient.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, or an `f` that changes the structure, shape,
            dtype or device of the state.
        NonConvergenceError: see `on_failure`.
    """
    solver = Anderson() if solver is None else solver
    stopping = Stopping() if stopping is None else stopping
    backward = ImplicitDifferentiation() if backward is None else backward
    check_settings("fixed_point", solver, stopping, backward, on_failure)
    if not isinstance(args, tuple):
        raise TypeError(f"fixed_point: args must be a tuple, got {type(args).__name__}")
    outer_solver, outer_stopping = solver, stopping

    def solve(
        f: Map,
        z0: Tensor,
        *,
        solver: Solver | None = None,
        stopping: Stopping | None = None,
        what: str = "fixed-point solve",
    ) -> Solution:
        solution = iterate(f, z0, solver or outer_solver, stopping or outer_stopping)
        report_failure(replace(solution, value=layout.unravel(solution.value)), on_failure, what)
        return solution

    flat_f, flat_z0, layout = flatten(lambda z: f(z, *args), z0)
    solution = backward.apply(flat_f, flat_z0, solve)
    return replace(solution, value=layout.unravel(solution.value))


def check_settings(owner: str, solver: object, stopping: object, backward: object, on_failure: str) -> None:
    """Raise unless every setting of a solve is of its kind."""
    check_instance(owner, Solver, "a solver such as deqlib.Anderson(memory=5)", solver=solver)
    check_instance(owner, Stopping, "a deqlib.Stopping such as Stopping(rtol=1e-3)", stopping=stopping)
    check_instance(
        owner, Backward, "a backward mode such as deqlib.ImplicitDifferentiation()", backward=backward
    )
    check_on_failure(owner, on_failure)

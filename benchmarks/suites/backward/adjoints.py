"""Implicit backward passes to one true residual of the adjoint, deqlib's and torchdeq's.

What each method's tolerance means differs, so none is believed: the adjoint u that reaches the cell's graph
is caught, its residual is computed anew in float64, and everybody gets the loosest tolerance with which the
residual meets the target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deqlib import GMRES, Anderson, Broyden, ImplicitDifferentiation, Picard, Solver, Stopping, fixed_point
from deqlib.counting import CountedCell
from deqlib.testing import Problem

from ...baselines import torchdeq

LOOSER, TIGHTER = 10, 14  # most steps away from the target in the search for a tolerance
BUDGET = 150  # products with J^T that a solve may take
PATIENCE = 3.0  # seconds that one attempt may take for its tolerance to be tuned further
OURS = "deqlib default"
THEIR_SOLVERS = {"Picard": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}

# From a problem, a tolerance and the products allowed to the fixed point carrying gradient.
Contender = Callable[[Problem, float, int], Tensor]


def ours(solver: Solver | None, problem: Problem, rtol: float, products: int) -> Tensor:
    """Differentiated implicitly by deqlib; `solver` of the adjoint, None for the default."""
    stopping = Stopping(rtol=rtol, max_steps=products - 1)  # one evaluation more than steps
    mode = ImplicitDifferentiation(stopping=stopping)
    value: Tensor = fixed_point(
        problem.f,
        problem.z0,
        solver=Picard(),
        stopping=Stopping.steps(0),  # the starting point is the fixed point
        backward=mode if solver is None else replace(mode, solver=solver),
        on_failure="ignore",
    ).value
    return value


def _theirs(solver: str, hook: bool, problem: Problem, rtol: float, products: int) -> Tensor:
    settings = {
        "f_solver": "fixed_point_iter",
        "f_max_iter": 0,
        "ift": not hook,
        "hook_ift": hook,
        "b_solver": THEIR_SOLVERS[solver],
        "b_tol": rtol,
        "b_max_iter": products - torchdeq.SOLVERS[solver][2],
    }
    return torchdeq.layer(settings, problem)


CONTENDERS: dict[str, Contender] = {
    OURS: partial(ours, None),
    "deqlib Picard": partial(ours, Picard()),
    "deqlib Anderson": partial(ours, Anderson()),
    "deqlib Broyden": partial(ours, Broyden()),
    "deqlib GMRES": partial(ours, GMRES()),
    **{
        f"torchdeq {solver}{', hook' * hook}": partial(_theirs, solver, hook)
        for solver in THEIR_SOLVERS
        for hook in (False, True)
    },
}


@dataclass(frozen=True)
class Attempt:
    """What came of a contender with a tolerance; None where there is no figure."""

    rtol: float
    products: int | None = None  # with J^T, the adjoint solve alone
    residual: float | None = None  # ||J^T u + g - u|| / ||u|| in float64, worst of the samples
    reached: bool = False
    error: str | None = None


def tuned(problem: Problem, g: Tensor, target: float, name: str, contender: Contender) -> Attempt:
    """The attempt with the loosest tolerance that meets the target, in steps of a square root of 2.

    Begins at the target and loosens while it is met, or tightens until it is. Who is slow is not tuned
    beyond meeting it.
    """

    def attempt(rtol: float, products: int) -> Attempt:
        return _attempt(problem, g, target, name, contender, rtol, products)

    begin = time.perf_counter()
    found = attempt(target, BUDGET)
    slow = time.perf_counter() - begin > PATIENCE
    if found.products is not None and found.reached:
        for k in range(1, 1 if slow else LOOSER + 1):
            looser = attempt(target * 2 ** (k / 2), found.products + 1)
            if not looser.reached:
                break
            found = looser
        return found
    for k in range(1, TIGHTER + 1):
        if found.reached or found.products is None or found.products >= BUDGET:
            break
        found = attempt(target * 2 ** (-k / 2), BUDGET)
    return found


def _attempt(
    problem: Problem, g: Tensor, target: float, name: str, contender: Contender, rtol: float, products: int
) -> Attempt:
    """One backward pass, its products counted and its adjoint caught and judged."""
    cell = CountedCell(problem.cell)
    try:
        torch.autograd.backward(contender(replace(problem, cell=cell), rtol, products), g)
    except Exception as error:  # this contender fails; the others are still measured
        return Attempt(rtol, error=f"{type(error).__name__}: {error}")
    finally:
        clear(problem)
    if cell.gradient is None:
        raise RuntimeError(f"{name}: no gradient reached the graph of the cell, so nothing can be measured")
    residual = adjoint_residual(problem, cell.gradient, g)
    known = residual if math.isfinite(residual) else None  # JSON has no NaN
    return Attempt(rtol, cell.products - 1, known, residual <= target)


def adjoint_residual(problem: Problem, u: Tensor, g: Tensor) -> float:
    """||J^T u + g - u|| / ||u|| at the starting point in float64, worst of the samples."""
    exact = problem.to(torch.float64)
    z = exact.z0.detach().requires_grad_()
    u, g = u.double(), g.double()
    (product,) = torch.autograd.grad(exact.f(z), z, u)
    residual = torch.linalg.vector_norm((product + g - u).flatten(1), dim=1)
    return float((residual / torch.linalg.vector_norm(u.flatten(1), dim=1)).max())


def clear(problem: Problem) -> None:
    """Drop the gradients of the inputs."""
    for leaf in problem.inputs:
        leaf.grad = None

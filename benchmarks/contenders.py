"""Who is compared: deqlib's solvers, torchdeq's and scipy's, each with the same budget of evaluations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import optimize
from scipy.linalg import LinAlgWarning
from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Stopping, fixed_point
from deqlib.testing import Problem

from .peers import torchdeq
from .show import COLORS

Contender = Callable[[Problem, float, int], Tensor]  # problem, rtol, evaluations allowed -> value

SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}
# torchdeq's `max_iter` counts evaluations, but Broyden's leaves out the first.
_TORCHDEQ: dict[str, tuple[Any, int]] = {
    "Picard": (torchdeq.solver.fp_iter.fixed_point_iter, 0),
    "Anderson": (torchdeq.solver.anderson.anderson_solver, 0),
    "Broyden": (torchdeq.solver.broyden.broyden_solver, 1),
}
# alpha=1 makes the first step Picard's; scipy's own guess takes ten times the evaluations. Its line search
# makes Broyden slower on these problems, and LGMRES, its choice, takes more products than GMRES.
_SCIPY: dict[str, Any] = {
    "Anderson": partial(optimize.anderson, alpha=1.0, line_search=None),
    "Broyden": partial(optimize.broyden1, alpha=1.0, line_search=None),
    "NewtonKrylov": partial(optimize.newton_krylov, method="gmres"),
}
SCIPY_LARGEST = 2**18  # numbers of a batch; beyond, a solve of scipy's takes up to ten seconds


def stopping(rtol: float, evaluations: int) -> Stopping:
    """deqlib's rule for at most so many evaluations."""
    return Stopping(rtol=rtol, max_steps=evaluations - 1, patience=50)


def _deqlibs(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
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


def _torchdeqs(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    solve, extra = _TORCHDEQ[name]
    value: Tensor = solve(problem.f, problem.z0, max_iter=evaluations - extra, tol=rtol, stop_mode="rel")[0]
    return value


def _scipys(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    """The last iterate of one of scipy's solvers, which takes the whole batch for one vector.

    Numbers stay in the type of the state: in float64 the differences by which Newton-Krylov
    differentiates would be below the rounding of a float32 cell.
    """
    search = _Search(problem, rtol, evaluations)
    try:
        # Iterates may diverge, and histories become dependent: whether it arrives is judged afterwards.
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", LinAlgWarning)
            _SCIPY[name](search.residual, search.start, f_tol=0.0, maxiter=evaluations, callback=search.look)
    except _Ended:
        pass
    return search.value


class _Ended(Exception):
    """The way out of scipy's loop, whose own rules know neither samples nor evaluations."""


class _Search:
    """A problem as scipy wants it: f(z) - z of one vector, and a look at every iterate."""

    def __init__(self, problem: Problem, rtol: float, evaluations: int) -> None:
        self.problem, self.rtol, self.left = problem, rtol, evaluations
        self.value = problem.z0
        self.start: np.ndarray[Any, Any] = problem.z0.flatten().cpu().numpy()

    def residual(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One evaluation, while there are any left."""
        if self.left == 0:
            raise _Ended
        self.left -= 1
        z = self._state(x)
        difference: np.ndarray[Any, Any] = (self.problem.f(z) - z).flatten().cpu().numpy()
        return difference

    def look(self, x: np.ndarray[Any, Any], residual: np.ndarray[Any, Any]) -> None:
        """Stop where the tolerance is met by every sample."""
        self.value, difference = self._state(x), self._state(residual)
        if worst_residual(self.value, self.value + difference) <= self.rtol:
            raise _Ended

    def _state(self, x: np.ndarray[Any, Any]) -> Tensor:
        z0 = self.problem.z0
        return torch.from_numpy(np.ascontiguousarray(x)).to(z0).view_as(z0)


def worst_residual(z: Tensor, fz: Tensor) -> float:
    """Largest relative residual of the samples, `z` and `fz` (B, ...)."""
    norms = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (fz - z, fz)]
    return float((norms[0] / norms[1]).amax())


CONTENDERS: dict[str, Contender] = {
    **{f"deqlib {name}": partial(_deqlibs, name) for name in SOLVERS},
    **{f"torchdeq {name}": partial(_torchdeqs, name) for name in _TORCHDEQ},
    **{f"scipy {name}": partial(_scipys, name) for name in _SCIPY},
}


def not_run(name: str, problem: Problem) -> str | None:
    """Why a contender is left out of a problem, if it is."""
    numbers = problem.z0.numel()
    if name.startswith("scipy") and numbers > SCIPY_LARGEST:
        return f"not run: {numbers:,} numbers are more than {SCIPY_LARGEST:,}"
    return None


def style(name: str) -> dict[str, Any]:
    """How a contender is drawn: the colour is that of its method, the dashes those of its library."""
    library, method = name.split()
    dashes = {"deqlib": "-", "torchdeq": "--", "scipy": ":"}
    return {"color": COLORS[list(SOLVERS).index(method)], "linestyle": dashes[library], "label": name}

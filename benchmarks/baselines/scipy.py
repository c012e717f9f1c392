"""scipy's solvers, which take the whole batch for one vector."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import optimize
from scipy.linalg import LinAlgWarning
from torch import Tensor

from deqlib.testing import Problem

from ..measure import worst_residual

# alpha=1 makes the first step Picard's; scipy's own guess takes ten times the evaluations. Its line search
# makes Broyden slower on these problems, and LGMRES, its choice, takes more products than GMRES.
SOLVERS: dict[str, Any] = {
    "Anderson": partial(optimize.anderson, alpha=1.0, line_search=None),
    "Broyden": partial(optimize.broyden1, alpha=1.0, line_search=None),
    "NewtonKrylov": partial(optimize.newton_krylov, method="gmres"),
}


def solve(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    """The last iterate of a solver, a name of `SOLVERS`, that may evaluate so often.

    Numbers stay in the type of the state: in float64 the differences by which Newton-Krylov
    differentiates would be below the rounding of a float32 cell.
    """
    search = _Search(problem, rtol, evaluations)
    try:
        # Iterates may diverge, and histories become dependent: whether it arrives is judged afterwards.
        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", LinAlgWarning)
            SOLVERS[name](search.residual, search.start, f_tol=0.0, maxiter=evaluations, callback=search.look)
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

"""The forward solve's inverse, used again for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._autocast import without_autocast
from .._checks import check_integer, check_number, settle_numbers
from ..solution import Solution
from ..solvers import Solver
from ..solvers.base import norms
from ..solvers.gmres import GMRES
from ..solvers.history import History
from ..solvers.secant import SecantSolver, SecantState
from ..state import FlatMap
from ..stopping import Stopping
from .base import Backward, Solve
from .graph import VectorJacobianProduct
from .tape import attach, on_tape, solve_off_tape, solve_unconfirmed

_MEMORY = 20  # most columns of the refining solve


@dataclass(frozen=True, kw_only=True)
class SharedInverse(Backward):
    """The adjoint (I - J^T)^-1 g from what the forward solve learnt: SHINE.

    A quasi-Newton solve ends with an estimate B of (J - I)^-1, and u = -B^T g costs no product with J. It
    knows J only along the way that the iterates went, so the gradient is biased, by no known bound; it is
    exact for affine maps where the differences that Anderson keeps span the whole state. A sample whose u is
    not finite, or longer than `fallback_ratio` times g, gets u = g, as in `JFB`; so does one whose solve
    ended where it began and learnt nothing. Needs `solver=Broyden()` or `Anderson()`; the latter's estimate
    is the better one where J is nearly symmetric. Never reports failure.
    (Ramzi et al. 2022, arXiv 2106.00553, with its fallback and refine strategies.)

    `refine` steps of GMRES go on from there with products J^T u, preconditioned by B where it was trusted;
    the error then falls towards that of `ImplicitDifferentiation`. On random nonsymmetric maps of spectral
    radius 0.9 and 50 unknowns, five steps leave half the error that five steps of GMRES from g do.

    Memory: one evaluation, and the solver's history, up to 2 * `memory` states, until the graph is freed. The
    backward pass takes half of the history once more, and 2 * min(`refine`, 20) + 10 states to refine. Cost:
    one evaluation, one vector-Jacobian product and `refine` more, and two products with the history for each.

    Args:
        refine: steps of the adjoint solve that starts from u, at least 0.
        fallback_ratio: largest ||u|| / ||g|| of a sample that is trusted, positive. Where ||J|| <= c < 1 the
            exact ratio is within [1 / (1 + c), 1 / (1 - c)]: raise it for cells of slow convergence. `None`
            trusts all that is finite.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    refine: int = 0
    fallback_ratio: float | None = 2.0

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_integer("SharedInverse", 0, refine=self.refine)
        if self.fallback_ratio is not None:
            check_number("SharedInverse", 0, open_minimum=True, fallback_ratio=self.fallback_ratio)

    def check(self, solver: Solver, stopping: Stopping) -> None:
        """Refuse solvers that do not estimate the inverse.

        Raises:
            ValueError: see above.
        """
        if not isinstance(solver, SecantSolver):
            raise ValueError(
                "SharedInverse: the forward solver must leave an estimate of the inverse, got "
                f"{solver!r}; use solver=Broyden() or solver=Anderson(), or another backward mode"
            )

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, evaluate once on it, use the solver's history in the backward pass."""
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        source, output = on_tape(f, solution.value)
        solution = confirm(output)
        state = solution.state
        assert isinstance(state, SecantState)
        history = state.history
        nothing = z0.new_empty(0)
        settings = replace(history, df=nothing, left=nothing)  # what is left holds no states

        def adjoint(g: Tensor, vjp: VectorJacobianProduct, df: Tensor, left: Tensor) -> Tensor:
            return self._adjoint(g, vjp, replace(settings, df=df, left=left), solve)

        return attach(solution, output, adjoint, source, nfe=1, kept=(history.df, history.left))

    def _adjoint(self, g: Tensor, vjp: VectorJacobianProduct, history: History, solve: Solve) -> Tensor:
        with without_autocast(g.device.type):
            shared = history.transposed(g)
        before, after = norms(g, shared)
        ratio = torch.inf if self.fallback_ratio is None else self.fallback_ratio
        trusted = ((after <= ratio * before) & after.isfinite()).unsqueeze(1)
        u = torch.where(trusted, shared, g)
        if self.refine == 0:
            return u

        def preconditioned(u: Tensor) -> Tensor:
            image = vjp(u) + g
            with without_autocast(g.device.type):
                change = history.transposed(image - u)
            return torch.where(trusted, u + change, image)

        solver = GMRES(memory=min(self.refine, _MEMORY))
        found = solve.linear(preconditioned, u, solver=solver, stopping=Stopping.steps(self.refine))
        value: Tensor = found.value
        return value

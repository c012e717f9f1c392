"""Implicit differentiation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._checks import check_instance
from ..solution import Solution
from ..solvers import Auto, Solver
from ..state import Map
from ..stopping import Stopping
from .base import Backward, Solve, VectorJacobianProduct, attach, on_tape, solve_off_tape


@dataclass(frozen=True, kw_only=True)
class ImplicitDifferentiation(Backward):
    """The exact gradient, from the implicit function theorem.

    The gradient g of the fixed point is turned into u = J^T u + g, the adjoint, itself a fixed point: the
    driver solves it with any solver, starting from g, and its failures fall under the same policy as the
    forward solve's. Then one vector-Jacobian product gives the gradient of everything f depends on.
    (Bai et al. 2019, arXiv 1909.01377, theorem 1.)

    The error is that of the two solves. Memory: one evaluation and the adjoint solver's history. Cost:
    one evaluation, and one vector-Jacobian product an adjoint step.

    Args:
        solver: of the adjoint.
        stopping: of the adjoint; its tolerance bounds the relative error of the gradient.
    """

    solver: Solver = field(default_factory=Auto)
    stopping: Stopping = field(default_factory=lambda: Stopping(rtol=1e-4))

    def __post_init__(self) -> None:
        """Validate."""
        hint = "a deqlib solver such as Anderson(memory=5)"
        check_instance("ImplicitDifferentiation", Solver, hint, solver=self.solver)
        check_instance(
            "ImplicitDifferentiation",
            Stopping,
            "a deqlib.Stopping such as Stopping(rtol=1e-4)",
            stopping=self.stopping,
        )

    def apply(self, f: Map, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, evaluate once on it, solve the adjoint in the backward pass."""
        solution = solve_off_tape(f, z0, solve)
        if not torch.is_grad_enabled():
            return solution

        def adjoint(g: Tensor, vjp: VectorJacobianProduct) -> Tensor:
            found = solve(
                lambda u: vjp(u) + g, g, solver=self.solver, stopping=self.stopping, what="adjoint solve"
            )
            value: Tensor = found.value
            return value

        source, output = on_tape(f, solution.value)
        return attach(solution, output, adjoint, source, nfe=1)

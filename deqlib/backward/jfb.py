"""Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_number, settle_numbers
from ..solution import Solution
from ..solvers.base import norms
from ..state import FlatMap
from .base import Backward, Solve
from .graph import VectorJacobianProduct
from .tape import attach, on_tape, solve_off_tape, solve_unconfirmed, straight_through


@dataclass(frozen=True, kw_only=True)
class JFB(Backward):
    """One evaluation on the tape at the fixed point: u = g instead of u = J^T u + g.

    The gradient's error is of first order in J. Memory: one evaluation. Cost: one evaluation and one
    vector-Jacobian product.
    (Fung et al. 2022, arXiv 2103.12803; the one-step case of Geng et al. 2021, arXiv 2111.05177.)

    With `adjoint_clip` c the adjoint takes one step, u = g + J^T g, and where that is longer than c ||g|| it
    is shortened to that length, sample by sample. Where it is not, the gradient's error is of second order;
    where the cell is no contraction, the gradient cannot grow. One product more.

    Args:
        adjoint_clip: c, above 0; default `None`, no step of the adjoint.

    Raises:
        TypeError, ValueError: `adjoint_clip` is no such number.
    """

    adjoint_clip: float | None = None

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        if self.adjoint_clip is not None:
            check_number("JFB", 0, open_minimum=True, adjoint_clip=self.adjoint_clip)

    @property
    def is_traceable(self) -> bool:
        """See `Backward`."""
        return self.adjoint_clip is None

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, then evaluate once on it."""
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        if self.adjoint_clip is not None:
            source, output = on_tape(f, solution.value)
            return attach(confirm(output), output, self._clipped_step, source, nfe=1)
        output = f(solution.value)
        return straight_through(confirm(output), output, nfe=1)

    def _clipped_step(self, g: Tensor, vjp: VectorJacobianProduct) -> Tensor:
        """g + J^T g, or as much of it as is `adjoint_clip` times as long as g."""
        assert self.adjoint_clip is not None
        u = g + vjp(g)
        length, stepped = norms(g, u)
        # Where both are 0 this is not a number, and so is not below 1.
        share = self.adjoint_clip * length / stepped
        return u * torch.where(share < 1, share, 1).unsqueeze(1)

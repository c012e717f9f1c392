"""Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solution import Solution
from ..state import FlatMap
from .base import Backward, Solve
from .tape import solve_off_tape, solve_unconfirmed, straight_through


@dataclass(frozen=True, kw_only=True)
class JFB(Backward):
    """One evaluation on the tape at the fixed point: u = g instead of u = J^T u + g.

    The gradient's error is of first order in J. Memory: one evaluation. Cost: one evaluation and one
    vector-Jacobian product.
    (Fung et al. 2022, arXiv 2103.12803; the one-step case of Geng et al. 2021, arXiv 2111.05177.)
    """

    @property
    def is_traceable(self) -> bool:
        """See `Backward`."""
        return True

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, then evaluate once on it."""
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        output = f(solution.value)
        return straight_through(confirm(output), output, nfe=1)

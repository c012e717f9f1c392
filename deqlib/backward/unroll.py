"""Differentiation through the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..solution import Solution
from ..state import Map
from .base import Backward, Solve


@dataclass(frozen=True, kw_only=True)
class Unroll(Backward):
    """The whole solve on the tape: the exact gradient of the iteration, of every order.

    Also the only mode that carries gradient to the starting point. Memory: every evaluation. Cost: one
    vector-Jacobian product an evaluation.
    """

    def apply(self, f: Map, z0: Tensor, solve: Solve) -> Solution:
        """Just the solve."""
        return solve(f, z0)

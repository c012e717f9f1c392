"""Differentiation through the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .._checks import check_instance
from .._torch import is_transformed
from ..solution import Solution
from ..state import FlatMap
from .base import Backward, Solve
from .checkpointing import Checkpointed
from .tape import with_first_step


@dataclass(frozen=True, kw_only=True)
class Unroll(Backward):
    """The whole solve on the tape: the exact gradient of the iteration, of every order.

    Besides `Reversible` the only mode that carries gradient to the starting point. Memory: every
    evaluation. Cost: one vector-Jacobian product an evaluation.

    A sample whose start no later iterate betters, such as one that begins at its solution, keeps the start as
    its value and has the gradient of one step from there. That takes one more evaluation.

    Args:
        checkpoint: keep of each evaluation only the state that it was made at, and evaluate again in the
            backward pass (`torch.utils.checkpoint`, not reentrant). Gradients of every order are the same.
            Memory: one state an evaluation (and the state of the random number generators, 5 kB on the
            CPU), what the solver's own steps save, and one evaluation during the backward pass. Cost: each
            evaluation once more, in the backward pass; `Solution.nfe` counts those of the forward pass.
            Random numbers are drawn as before; other side effects of the cell (running statistics,
            counters) happen twice. Evaluations inside a function transform, such as the Jacobian products
            of `NewtonKrylov`, are kept whole: PyTorch cannot checkpoint them, and refuses a cell that uses
            transforms of `torch.func` itself. Default `False`.

    Raises:
        TypeError: `checkpoint` is not a bool.
    """

    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        check_instance("Unroll", bool, "True or False", checkpoint=self.checkpoint)

    @property
    def is_traceable(self) -> bool:
        """See `Backward`."""
        return not self.checkpoint

    @property
    def is_traceable_in_transforms(self) -> bool:
        """See `Backward`."""
        return True

    @property
    def may_change_by_step(self) -> bool:
        """See `Backward`."""
        return True

    def apply(self, f: FlatMap, z0: torch.Tensor, solve: Solve) -> Solution:
        """Just the solve, and a step for samples that took none."""
        is_recorded = torch.is_grad_enabled()
        if self.checkpoint and is_recorded:
            f = replace(f, cell=Checkpointed(f.cell, "Unroll"))
        solution = solve(f, z0)
        if solve.stopping.is_fixed or not (is_recorded or is_transformed()):
            return solution
        return with_first_step(solution, f, z0)

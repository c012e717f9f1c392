"""A cell so many times: as explicit depth, and as an implicit layer of so many solver steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqlib import JFB, Backward, ImplicitDifferentiation, ImplicitLayer, PhantomGradient, Picard, Stopping

MakeCell = Callable[[], nn.Module]  # a new cell(z, x) -> z
MakeBody = Callable[[MakeCell], nn.Module]  # of a cell: x -> z


class Explicit(nn.Module):
    """Cells one after the other, from zero, each fed the input.

    Args:
        cells: as many as the depth, or one for all of it.
        depth: evaluations.
        checkpointed: keep only the states between evaluations, and evaluate again in the backward pass.
    """

    def __init__(self, cells: Sequence[nn.Module], depth: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.depth, self.checkpointed = depth, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """The last state, shape of `x`."""
        z = torch.zeros_like(x)
        for step in range(self.depth):
            cell = self.cells[step % len(self.cells)]
            if self.checkpointed:
                z = checkpoint(cell, z, x, use_reentrant=False, preserve_rng_state=False)
            else:
                z = cell(z, x)
        return z


def implicit(backward: Callable[[int], Backward]) -> Callable[[MakeCell, int], nn.Module]:
    """An implicit layer that takes as many Picard steps; `backward` of the depth is its mode."""

    def make(make_cell: MakeCell, depth: int) -> nn.Module:
        return ImplicitLayer(
            make_cell(), solver=Picard(), backward=backward(depth), stopping=Stopping.steps(depth)
        )

    return make


CONTENDERS: dict[str, Callable[[MakeCell, int], nn.Module]] = {
    # Weights of its own for every step, or one set for all.
    "explicit, untied": lambda make_cell, depth: Explicit([make_cell() for _ in range(depth)], depth),
    "explicit, tied": lambda make_cell, depth: Explicit([make_cell()], depth),
    "explicit, tied, checkpointed": lambda make_cell, depth: Explicit(
        [make_cell()], depth, checkpointed=True
    ),
    "implicit, JFB": implicit(lambda depth: JFB()),
    "implicit, PhantomGradient": implicit(lambda depth: PhantomGradient()),
    # As many steps of the adjoint as of the solve, so that the price of both grows with the depth.
    "implicit, ImplicitDifferentiation": implicit(
        lambda depth: ImplicitDifferentiation(solver=Picard(), stopping=Stopping.steps(depth))
    ),
}
EXPLICIT = tuple(name for name in CONTENDERS if name.startswith("explicit"))
IMPLICIT = tuple(name for name in CONTENDERS if name.startswith("implicit"))


def of_depth(name: str, depth: int) -> MakeBody:
    """A contender, its depth filled in."""
    return lambda make_cell: CONTENDERS[name](make_cell, depth)


def parameters(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters())

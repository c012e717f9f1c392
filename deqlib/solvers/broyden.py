"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_integer
from .base import Solver, combination, dot, products, write_row


@dataclass(frozen=True)
class BroydenState:
    """Low-rank factors of the inverse Jacobian estimate B = -I + sum_i u_i v_i^T."""

    num_steps: int
    z: Tensor  # (B, D), the iterate before
    residual: Tensor  # (B, D), there
    u: Tensor  # (B, memory, D), zero where no term is held
    v: Tensor  # (B, memory, D), likewise


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's "good" method in inverse form, started from a Picard step.

    With r(z) = f(z) - z and B an estimate of (J - I)^-1, B = -I at first: z <- z - B r, then
    B <- B + (dz - B dr) dz^T B / (dz^T B dr), kept as `memory` rank-one terms. When the memory is full,
    B starts again from -I: a term makes sense only on top of those before it, so dropping the oldest
    alone makes the iteration wander. The newest secant equation B dr = dz holds throughout.
    (Broyden 1965, Math. Comp. 19; in implicit layers: Bai et al. 2019, arXiv 1909.01377.)

    Costs three products with the history, O(memory * D), a step. Reaches fixed points that repel Picard.

    Args:
        memory: most rank-one terms kept; each takes two states.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        """Validate."""
        check_integer("Broyden", 1, memory=self.memory)

    def init(self, z0: Tensor) -> BroydenState:
        """B = -I."""
        batch, width = z0.shape
        empty = z0.new_zeros(batch, self.memory, width)
        return BroydenState(num_steps=0, z=z0, residual=z0, u=empty, v=empty.clone())

    def step(self, z: Tensor, fz: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        """One evaluation is one step."""
        residual = fz - z
        u, v = state.u, state.v
        if state.num_steps:
            slot = (state.num_steps - 1) % self.memory
            if slot == 0 and state.num_steps > 1:
                u, v = torch.zeros_like(u), torch.zeros_like(v)
            dz, dr = z - state.z, residual - state.residual
            b_dr = combination(products(v[:, :slot], dr), u[:, :slot]) - dr
            dz_b = combination(products(u[:, :slot], dz), v[:, :slot]) - dz
            denominator = dot(dz, b_dr)
            # Below this the update is rounding noise; the sample goes on with the estimate it has. The
            # comparison is false for a sample that is not finite.
            floor = torch.finfo(z.dtype).eps * dz.norm(dim=1) * b_dr.norm(dim=1)
            usable = (denominator.abs() > floor).unsqueeze(1)
            safe = torch.where(usable, denominator.unsqueeze(1), torch.ones_like(denominator.unsqueeze(1)))
            u = write_row(u, slot, torch.where(usable, (dz - b_dr) / safe, torch.zeros_like(z)))
            v = write_row(v, slot, torch.where(usable, dz_b, torch.zeros_like(z)))
            size = slot + 1
            z_next = z + residual - combination(products(v[:, :size], residual), u[:, :size])
        else:
            z_next = fz
        return z_next, BroydenState(state.num_steps + 1, z, residual, u, v)

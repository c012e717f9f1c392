"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from .base import Solver, combination, products, write_row


@dataclass(frozen=True)
class AndersonState:
    """The last differences of residuals and of f-values, and the Gram matrix of the former."""

    num_steps: int
    fz: Tensor  # (B, D), at the iterate before
    residual: Tensor  # (B, D), there
    df: Tensor  # (B, memory, D), differences of f-values, cyclic
    dr: Tensor  # (B, memory, D), differences of residuals, cyclic
    gram: Tensor  # (B, memory, memory), dr times its transpose


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration, type II, in difference form.

    With dR and dF the last `memory` differences of residuals and of f-values,
    gamma = argmin ||r - dR gamma|| and z <- f(z) - dF gamma - (1 - damping) (r - dR gamma).
    (Walker & Ni 2011, SIAM J. Numer. Anal. 49(4), equations 2.1 to 2.3.)

    The Gram matrix is kept: a step computes one new row of it, so its cost is O(memory * D).

    Args:
        memory: most differences kept.
        ridge: added to the diagonal of the Gram matrix after its columns were scaled to unit norm, so
            it means the same at every size of the residual.
        damping: in (0, 1], of the residual that the combination leaves.
    """

    memory: int = 5
    ridge: float = 1e-7
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        check_integer("Anderson", 1, memory=self.memory)
        check_number("Anderson", 0, ridge=self.ridge)
        check_number("Anderson", 0, 1, open_minimum=True, damping=self.damping)

    def init(self, z0: Tensor) -> AndersonState:
        """Empty history."""
        batch, width = z0.shape
        return AndersonState(
            num_steps=0,
            fz=z0,
            residual=z0,
            df=z0.new_empty(batch, self.memory, width),
            dr=z0.new_empty(batch, self.memory, width),
            gram=z0.new_empty(batch, self.memory, self.memory),
        )

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        """One evaluation is one step; the first is a damped Picard step."""
        residual = fz - z
        plain = fz if self.damping == 1 else torch.lerp(z, fz, self.damping)
        df, dr, gram = state.df, state.dr, state.gram
        if state.num_steps:
            slot = (state.num_steps - 1) % self.memory
            size = min(state.num_steps, self.memory)
            df = write_row(df, slot, fz - state.fz)
            dr = write_row(dr, slot, residual - state.residual)
            row = products(dr[:, :size], dr[:, slot])
            if size < self.memory:
                row = torch.nn.functional.pad(row, (0, self.memory - size))
            gram = write_row(write_row(gram, slot, row).mT, slot, row).mT
            gamma = self._coefficients(gram[:, :size, :size], products(dr[:, :size], residual))
            plain = plain - combination(gamma, df[:, :size])
            if self.damping != 1:
                plain = plain + (1 - self.damping) * combination(gamma, dr[:, :size])
        return plain, AndersonState(state.num_steps + 1, fz, residual, df, dr, gram)

    def _coefficients(
        self,
        gram: Tensor,  # (B, m, m)
        rhs: Tensor,  # (B, m)
    ) -> Tensor:
        """Least-squares coefficients (B, m); zero, a Picard step, where the system cannot be solved."""
        norms = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        scaled = gram / (norms.unsqueeze(1) * norms.unsqueeze(2))
        # A sample at rest has columns of zeros: without this their system is singular where ridge is 0,
        # and its gradient NaN.
        scaled = torch.where(identity > 0, 1 + self.ridge, scaled)
        # A sample that is not finite must neither raise nor reach its batch-mates.
        finite = scaled.isfinite().flatten(1).all(1)
        scaled = torch.where(finite[:, None, None], scaled, identity)
        gamma = torch.linalg.solve_ex(scaled, (rhs / norms).unsqueeze(2))[0].squeeze(2) / norms
        return torch.where(gamma.isfinite().all(1, keepdim=True), gamma, torch.zeros_like(gamma))

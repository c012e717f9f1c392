"""The contract of a solver, and what solvers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Solver(ABC):
    """A rule that turns `z` and `f(z)` into the next iterate.

    Subclasses are frozen, keyword-only dataclasses of settings. All that changes during a solve lives in
    the state they return. A solver never calls `f`, never decides to stop, never sees a pytree; every
    sample is treated by itself, so a sample that is not finite stays the only one.
    """

    @abstractmethod
    def init(
        self,
        z0: Tensor,  # (B, D)
    ) -> Any:
        """State before the first step."""

    @abstractmethod
    def step(
        self,
        z: Tensor,  # (B, D)
        fz: Tensor,  # (B, D), the map at z
        state: Any,
    ) -> tuple[Tensor, Any]:
        """Next iterate (B, D) and next state. The state passed in must not be used again."""


def dot(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:
    """Inner product of each sample, shape (B,)."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def products(
    rows: Tensor,  # (B, m, D)
    vector: Tensor,  # (B, D)
) -> Tensor:
    """Inner products of each sample's rows with its vector, shape (B, m)."""
    return torch.bmm(rows, vector.unsqueeze(2)).squeeze(2)


def combination(
    coefficients: Tensor,  # (B, m)
    rows: Tensor,  # (B, m, D)
) -> Tensor:
    """Sum of each sample's rows weighted by its coefficients, shape (B, D)."""
    return torch.bmm(coefficients.unsqueeze(1), rows).squeeze(1)


def write_row(
    rows: Tensor,  # (B, m, ...)
    slot: int,
    row: Tensor,  # (B, ...)
) -> Tensor:
    """`rows` with one row replaced: in place, or in a copy while autograd records."""
    if torch.is_grad_enabled() and (rows.requires_grad or row.requires_grad):
        return torch.cat([rows[:, :slot], row.unsqueeze(1), rows[:, slot + 1 :]], 1)
    rows[:, slot] = row
    return rows

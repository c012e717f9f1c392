"""Picard iteration, the plain fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_number, settle_numbers
from .base import Solver


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """z <- (1 - damping) z + damping f(z).

    Converges where `max |1 - damping + damping * lambda(J)| < 1`, at that rate. Keeps no history.

    Args:
        damping: in (0, 1]; 1 is the plain iteration.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_number("Picard", 0, 1, open_minimum=True, damping=self.damping)

    def init(self, z0: Tensor) -> None:
        """No state."""

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        """One evaluation is one step."""
        return (fz if self.damping == 1 else torch.lerp(z, fz, self.damping)), None

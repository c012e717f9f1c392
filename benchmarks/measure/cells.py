"""Cells that note what they are asked, so that everybody is seen alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Watched:
    """A cell that records the largest relative residual of each batch it sees, and when it came.

    Attributes:
        cell: which is watched.
        residuals: one a call.
        seconds: one a call, since it was made, without what recording takes.
    """

    cell: Callable[..., Tensor]
    residuals: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    begin: float = field(default_factory=time.perf_counter)  # moves on while something is recorded

    def __call__(self, z: Tensor, *inputs: Any) -> Tensor:
        """The cell."""
        fz = self.cell(z, *inputs)
        if fz.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.residuals.append(worst_residual(z, fz))
        self.begin += time.perf_counter() - now
        return fz


def worst_residual(z: Tensor, fz: Tensor) -> float:
    """Largest relative residual of the samples, `z` and `fz` (B, ...)."""
    norms = [torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (fz - z, fz)]
    return float((norms[0] / norms[1]).amax())

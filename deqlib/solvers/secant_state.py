"""What a secant method keeps of a batch: its history, its safeguards, and what it was told of this step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .history import History
from .safeguards import Safeguards


@dataclass(frozen=True)
class Judged:
    """What `observe` found out for the step that follows."""

    difference: Tensor | None  # (B, D), f(z) - z; None: it is to be computed
    refused: Tensor | None  # (B,), bool, samples that must undo their last step; None: nobody


@dataclass(eq=False)
class SecantState:
    """What a secant method keeps of a batch. A step changes it in place."""

    history: History
    safeguards: Safeguards
    judged: Judged | None = None  # between `observe` and `step`

    def watch(
        self,
        which: Tensor,  # (B,), bool
    ) -> None:
        """Another method moves these samples from now on; the history goes on learning from what they do."""
        self.safeguards.watch(which)

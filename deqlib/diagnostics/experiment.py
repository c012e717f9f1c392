"""What a metric is given: a cell at its inputs, the settings of a diagnosis, and the fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backward import Backward
from ..layer import ImplicitLayer
from ..solution import Solution
from ..stopping import Stopping
from .subject import Linearization, Subject, normal


@dataclass(frozen=True)
class Experiment:
    """A layer's cell at its inputs, the settings of `diagnose`, and the fixed point to take metrics at.

    Attributes:
        layer: what is diagnosed.
        subject: its cell at the inputs.
        modes: the backward modes to compare, the layer's own first.
        stopping: the rule that solves are compared by.
        num_starts: random starts of path independence.
        num_products: most products with J^T of one Krylov process.
        rounds: how often what is compared is timed.
        loss: whose gradient is sent back, see `diagnose`.
        generator: of all that is drawn; metrics draw in the order in which they are listed.
        solution: what the layer's solver finds by `stopping`.
        own: what it finds by the layer's own stopping rule.
        reference: `solution` gone on with to rounding, by any method.
    """

    layer: ImplicitLayer
    subject: Subject
    modes: Sequence[Backward]
    stopping: Stopping
    num_starts: int
    num_products: int
    rounds: int
    loss: Callable[[Any], Tensor] | None
    generator: torch.Generator
    solution: Solution
    own: Solution
    reference: Solution

    @property
    def z(self) -> Tensor:
        """The fixed point, (B, D); the best iterate where there is none."""
        return self.subject.ravel(self.reference.value)

    def linearize(self) -> Linearization:
        """The cell at the fixed point on the tape, at the cost of an evaluation and of keeping its graph."""
        return Linearization.at(self.subject.f, self.z)

    def normal(self) -> Tensor:
        """Normal numbers, (B, D)."""
        return normal(self.z, self.generator)

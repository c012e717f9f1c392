"""How near the gradients of backward modes come to the exact one, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch import tree_leaves, tree_map
from ..experiment import Experiment
from ..gradients import ExactGradient
from ..reports import GradientReport, MetricReport, SolveReport
from ..settings import accepted_solver, labels
from ..subject import Subject


@dataclass(frozen=True, eq=False)
class GradientComparison(MetricReport):
    """The exact gradient and those beside it.

    Attributes:
        adjoint: the adjoint solve with the settings of the layer's `ImplicitDifferentiation`, or the default
            ones where it has another mode.
        exact_adjoint: the adjoint solve to rounding.
        modes: one report a backward mode, the layer's own first.
    """

    adjoint: SolveReport
    exact_adjoint: SolveReport
    modes: tuple[GradientReport, ...]

    def numbers(self) -> dict[str, Tensor]:
        """None: they are those of the batch, and have a table of their own."""
        return {}


def measure_gradients(experiment: Experiment) -> GradientComparison:
    """Every mode run as the layer would run it, with its own solver and stopping rule.

    A mode that refuses the layer's solver runs with one that it takes.
    """
    layer, subject, loss = experiment.layer, experiment.subject, experiment.loss
    cotangent = experiment.normal() if loss is None else _gradient_of(loss, subject, experiment.z)
    exact = ExactGradient.at(subject, experiment.z, cotangent, layer.backward_mode)
    modes = []
    for name, mode in zip(labels(experiment.modes), experiment.modes, strict=True):
        solver = accepted_solver(mode, layer.solver, layer.stopping, owner="diagnose: modes")
        modes.append(exact.compare(name, mode, solver, layer.stopping))
    return GradientComparison(exact.adjoint, exact.exact_adjoint, tuple(modes))


def _gradient_of(loss: Callable[[Any], Tensor], subject: Subject, z: Tensor) -> Tensor:
    """The gradient of the loss at z, both (B, D).

    Raises:
        TypeError: the loss is no tensor of one number.
        ValueError: the loss does not depend on z.
    """
    value = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), subject.f.layout.unravel(z))
    result = loss(value)
    if not isinstance(result, Tensor) or result.numel() != 1:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"diagnose: loss must return a tensor of one number, got {got}")
    if not result.requires_grad:
        raise ValueError(
            "diagnose: loss must depend on the fixed point it is given, got one without gradient"
        )
    leaves = tree_leaves(value)
    found = torch.autograd.grad(result.sum(), leaves, allow_unused=True, retain_graph=True)
    rows = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return torch.cat([row.flatten(1) if row.dim() > 1 else row.unsqueeze(1) for row in rows], 1).to(z.dtype)

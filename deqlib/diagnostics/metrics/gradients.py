"""How near the gradients of backward modes come to the exact one, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch import tree_leaves, tree_map
from ..experiment import Experiment
from ..gradients import ExactGradient, compare_modes
from ..precision import PrecisionReport, measure_precision
from ..reports import UNCOUNTED, GradientReport, MetricReport, SolveReport
from ..settings import accepted_solver
from ..subject import Subject


@dataclass(frozen=True, eq=False)
class GradientComparison(MetricReport):
    """The exact gradient and those beside it.

    Attributes:
        adjoint: the adjoint solve with the settings of the layer's `ImplicitDifferentiation`, or the default
            ones where it has another mode.
        exact_adjoint: the adjoint solve to rounding.
        modes: one report a backward mode, the layer's own first.
        precision: how much the layer's gradient owes to where its two solves stop.
    """

    adjoint: SolveReport
    exact_adjoint: SolveReport
    modes: tuple[GradientReport, ...]
    precision: PrecisionReport

    def numbers(self) -> dict[str, Tensor]:
        """None: they are those of the batch, and have tables of their own."""
        return {}


def measure_gradients(experiment: Experiment) -> GradientComparison:
    """Every mode run as the layer would run it, with its own solver and stopping rule.

    A mode that refuses the layer's solver runs with one that it takes.
    """
    layer, subject, loss = experiment.layer, experiment.subject, experiment.loss
    cotangent = experiment.normal() if loss is None else _gradient_of(loss, subject, experiment.z)
    exact = ExactGradient.at(subject, experiment.z, cotangent, layer.backward)
    pairs = [
        (mode, accepted_solver(mode, layer.solver, layer.stopping, owner="diagnose: modes"))
        for mode in experiment.modes
    ]
    modes = compare_modes(exact, pairs, layer.stopping, experiment.rounds, experiment.z.device)
    own = experiment.own
    assert own.relative_residual is not None  # it was measured
    z = subject.ravel(own.value)
    precision = measure_precision(exact, z, own.relative_residual, layer.backward)
    notes = []
    if any(mode.saved_bytes is None for mode in modes):
        notes.append(UNCOUNTED)
    return GradientComparison(exact.adjoint, exact.exact_adjoint, modes, precision, notes=tuple(notes))


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

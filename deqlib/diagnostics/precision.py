"""How far the gradient of a layer is from the exact one because its two solves stop where they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backward import Backward, ImplicitDifferentiation
from ..solvers.base import norms
from .gradients import Difference, ExactGradient, Gradients
from .subject import Linearization


@dataclass(frozen=True, eq=False)
class PrecisionReport:
    """Errors of the exact gradient, relative to the one with both solves at rounding, one solve at a time.

    Each is told twice: `error` of all trainable tensors of the cell together, `input_error` of all
    floating-point inputs together (`None` where there are none), and `worst` is the larger one.

    Attributes:
        both: with the forward and the adjoint solve as the layer has them; `None` where its backward mode is
            not `ImplicitDifferentiation`.
        forward: with the layer's forward solve and an adjoint at rounding: what the forward solve is to blame
            for.
        adjoint: with a forward solve at rounding and the layer's adjoint: what the adjoint is to blame for;
            `None` where the layer has none.
        share: of every sample in the squared error of the tensors or of the inputs, whichever are further
            off, float64, (B,); they add up to 1, and one is negative where a sample makes up for others. NaN
            where there is no error.
        residual: relative residual of every sample at the layer's own forward solve, (B,).
    """

    both: Difference | None
    forward: Difference
    adjoint: Difference | None
    share: Tensor
    residual: Tensor

    def __repr__(self) -> str:
        return f"PrecisionReport(error {self.error:.3g}, {len(self.share)} samples)"

    @property
    def error(self) -> float:
        """The larger error, of tensors or inputs, with the layer's own solves; NaN where it is not known."""
        return (self.both or self.forward).worst


def measure_precision(
    exact: ExactGradient,
    z: Tensor,  # (B, D)
    residual: Tensor,  # (B,)
    mode: Backward,
) -> PrecisionReport:
    """Compare the gradient at z (B, D), where the layer's own forward solve ends, with the exact one.

    Args:
        exact: the gradient at the fixed point.
        z: where the layer's own forward solve ends, (B, D).
        residual: its relative residual there, (B,).
        mode: the layer's.
    """
    there = ExactGradient.at(exact.subject, z, exact.cotangent, mode)
    leaves, is_implicit = exact.leaves, isinstance(mode, ImplicitDifferentiation)
    tight = leaves.gradients(there.point.output, there.solved)
    found, u = tight, there.solved
    both = adjoint = None
    if is_implicit:
        found, u = leaves.gradients(there.point.output, there.own), there.own
        both = Difference.between(found, exact.values)
        adjoint = Difference.between(leaves.gradients(exact.point.output, exact.own), exact.values)
    return PrecisionReport(
        both=both,
        forward=Difference.between(tight, exact.values),
        adjoint=adjoint,
        share=_shares(exact, there.point, u, found).to("cpu", torch.float64),
        residual=residual.detach().to("cpu", torch.float64),
    )


def _shares(exact: ExactGradient, point: Linearization, u: Tensor, found: Gradients) -> Tensor:
    """Shares (B,) of the samples in the squared difference d of two gradients, <d_i, d> / <d, d>.

    A gradient is a sum over samples, linear in each sample's adjoint u_i, so <gradient_i, d> is u_i times
    the derivative of <gradient, d> by u_i: two more passes, whatever the number of samples.
    """
    difference = Difference.between(found, exact.values)
    of_tensors = difference.error is not None and difference.error == difference.worst
    leaves = exact.leaves.tensors if of_tensors else exact.leaves.inputs
    pair = (found.tensors, exact.values.tensors) if of_tensors else (found.inputs, exact.values.inputs)
    try:
        direction = [a - b for a, b in zip(*pair, strict=True)]
        here = _along(point, leaves, u, direction)
        parts = here - _along(exact.point, leaves, exact.solved, direction)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # a cell that is differentiable once: by its adjoints
        (length,) = norms(u - exact.solved)
        parts = length.double().square()
    return parts / parts.sum()


def _along(point: Linearization, leaves: Sequence[Tensor], u: Tensor, direction: Sequence[Tensor]) -> Tensor:
    """<gradient_i, direction> of every sample, (B,), the gradient being that of <u, output>."""
    u = u.detach().requires_grad_()
    if not leaves:  # PyTorch 2.11 refuses to differentiate by nothing
        return torch.zeros(len(u), dtype=torch.float64, device=u.device)
    found = torch.autograd.grad(point.output, leaves, u, create_graph=True, allow_unused=True)
    total = sum((g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None)
    if not isinstance(total, Tensor):  # the output depends on none of them
        return torch.zeros(len(u), dtype=torch.float64, device=u.device)
    (by_sample,) = torch.autograd.grad(total, u)
    return (by_sample.double() * u.detach().double()).sum(1)

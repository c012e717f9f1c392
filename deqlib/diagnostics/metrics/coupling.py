"""Whether samples depend on one another, which a solve takes for granted that they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...solvers.base import norms
from ..experiment import Experiment
from ..reports import MetricReport


@dataclass(frozen=True, eq=False)
class CouplingReport(MetricReport):
    """How far the image of a sample moves where others do.

    Attributes:
        movement: distance that a sample's image moves, relative to its norm, where a random half of the
            batch, which it is not of, moves by as much as it is long, float64, (B,). It is 0 up to what two
            evaluations differ by, so that a cell that draws random numbers is not taken for one that mixes
            samples, and NaN where the image is not finite.
    """

    movement: Tensor

    @property
    def num_coupled(self) -> int:
        """Samples that move with others."""
        return int((self.movement > 0).sum())

    def numbers(self) -> dict[str, Tensor]:
        """The movement."""
        return {"moved by other samples": self.movement}


def measure_coupling(experiment: Experiment) -> CouplingReport | None:
    """Move a random half of the samples at the fixed point, then the other; `None` where there is only one.

    Four evaluations, two of them at the fixed point.
    """
    f, z, eps = experiment.subject.f, experiment.z, experiment.subject.eps
    if len(z) < 2:
        return None
    step = experiment.normal()
    size, length = norms(z, step)
    size = torch.where(size.isfinite() & (size > 0), size, length)
    step = step * (size / length.clamp_min(torch.finfo(length.dtype).tiny)).unsqueeze(1)
    order = torch.randperm(len(z), generator=experiment.generator, device=experiment.generator.device)
    half = torch.zeros(len(z), 1, dtype=torch.bool, device=z.device)
    half[order.to(z.device)[: len(z) // 2]] = True
    with torch.no_grad():
        one, two = f(z), f(z)
        image = torch.where(half, f(torch.where(half, z, z + step)), f(torch.where(half, z + step, z)))
    moved, noise, scale = (found.to("cpu", torch.float64) for found in norms(image - one, two - one, one))
    scale = scale.clamp_min(torch.finfo(torch.float64).tiny)
    room = 10 * (eps + float((noise / scale).nan_to_num(0, 0).max()))
    movement = torch.where(moved > room * scale, moved / scale, torch.zeros_like(moved))
    return CouplingReport(torch.where(scale.isfinite(), movement, torch.full_like(moved, torch.nan)))

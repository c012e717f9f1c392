"""The factor by which plain iteration shrinks the residual in the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...solvers.base import norms
from ..experiment import Experiment
from ..reports import MetricReport

_RATIOS = 10  # last ratios of residuals that the factor is the median of


@dataclass(frozen=True, eq=False)
class ContractionReport(MetricReport):
    """How fast Picard's method converges.

    Attributes:
        factor: median of the last ten ratios of successive residuals, float64, (B,). NaN where iteration is
            done at once, above 1 where it diverges, infinite where it overflows.
    """

    factor: Tensor

    def numbers(self) -> dict[str, Tensor]:
        """The factor."""
        return {"contraction of Picard": self.factor}


def measure_contraction(experiment: Experiment) -> ContractionReport:
    """Iterate from the layer's own start, until every residual is rounding or there are no steps left."""
    subject = experiment.subject
    sizes, floors = [], []
    with torch.no_grad():
        z = subject.ravel(subject.z0)
        for _ in range(experiment.stopping.max_steps + 1):
            z, before = subject.f(z), z
            size, scale = norms(z - before, z)
            sizes.append(size)
            floors.append(10 * subject.eps * scale)  # below, residuals are rounding
            if not bool(((size > floors[-1]) & size.isfinite()).any()):
                break
    residual, floor = (torch.stack(rows).to("cpu", torch.float64) for rows in (sizes, floors))
    usable = residual.isfinite() & (residual > floor)
    ratios = residual[1:] / residual[:-1]
    factor = torch.full((residual.shape[1],), torch.nan, dtype=torch.float64)
    for sample in range(len(factor)):
        known = ratios[usable[1:, sample] & usable[:-1, sample], sample]
        if not bool(residual[-1, sample].isfinite()) and bool(residual[0, sample].isfinite()):
            factor[sample] = torch.inf
        elif known.numel():
            factor[sample] = known[-_RATIOS:].median()
    return ContractionReport(factor)

"""Whether the cell is a function: the same value whenever it is asked for one point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..experiment import Experiment
from ..reports import MetricReport


@dataclass(frozen=True)
class DeterminismReport(MetricReport):
    """Whether two evaluations agree.

    Attributes:
        deterministic: whether they do at the fixed point, up to the order in which a device sums.
    """

    deterministic: bool

    def numbers(self) -> dict[str, Tensor]:
        """None: it is said of the whole batch, by the advice."""
        return {}


def measure_determinism(experiment: Experiment) -> DeterminismReport:
    """Evaluate the cell twice at the fixed point."""
    f, z = experiment.subject.f, experiment.z
    with torch.no_grad():
        one, two = f(z), f(z)
    room = 10 * experiment.subject.eps * float(one.nan_to_num(0, 0, 0).abs().max())
    return DeterminismReport(torch.allclose(one, two, rtol=0, atol=room, equal_nan=True))

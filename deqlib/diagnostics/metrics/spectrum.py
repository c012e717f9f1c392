"""How large the Jacobian J at the fixed point is: its spectral radius and its spectral norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import torch
from torch import Tensor

from ..experiment import Experiment
from ..krylov import spectral_norm, spectral_radius
from ..reports import MetricReport

_REASON = 200  # characters of an error that a note repeats


@dataclass(frozen=True, eq=False)
class SpectrumReport(MetricReport):
    """The size of every sample's Jacobian.

    Attributes:
        radius: largest modulus of an eigenvalue, float64, (B,); NaN where the cell is not finite.
        norm: largest singular value, float64, (B,); NaN likewise, and where the cell cannot be differentiated
            in the way that this takes.
    """

    radius: Tensor
    norm: Tensor

    def numbers(self) -> dict[str, Tensor]:
        """Both."""
        return {"spectral radius of J": self.radius, "spectral norm of J": self.norm}


def measure_spectrum(experiment: Experiment) -> SpectrumReport:
    """The radius by Arnoldi's process with J^T, the norm by Lanczos' process with J^T J.

    Products J v come from forward mode, or from differentiating twice where the cell does not support that.
    """
    point = experiment.linearize()
    radius = spectral_radius(point.transposed, experiment.normal(), experiment.num_products)
    start, half = experiment.normal(), -(-experiment.num_products // 2)
    if not point.output.requires_grad:
        return SpectrumReport(radius, radius, notes=("the cell's output carries no gradient",))
    if not bool(torch.any(point.transposed(start) != 0)):  # NaN counts as not zero
        return SpectrumReport(radius, torch.zeros_like(radius))
    notes = []
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "in forward mode": point.forward_mode,
        "twice": point.differentiated_twice,
    }
    for how, jacobian in ways.items():
        try:
            norm = spectral_norm(jacobian, point.transposed, start, half)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            # PyTorch may list every backend that there is.
            reason = shorten((str(error).strip() or type(error).__name__).splitlines()[0], _REASON)
            notes.append(f"the cell cannot be differentiated {how} ({reason})")
        else:
            return SpectrumReport(radius, norm, notes=tuple(notes))
    unknown = torch.full_like(radius, torch.nan)
    return SpectrumReport(radius, unknown, notes=(*notes, "so its spectral norm is not known"))

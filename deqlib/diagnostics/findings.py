"""All that `diagnose` measures, as data: what advice, tables and plots read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..stopping import Stopping
from .metrics.contraction import ContractionReport
from .metrics.coupling import CouplingReport
from .metrics.determinism import DeterminismReport
from .metrics.gradients import GradientComparison
from .metrics.paths import PathReport
from .metrics.spectrum import SpectrumReport
from .precision import PrecisionReport
from .reports import (
    GradientReport,
    MetricReport,
    SolveReport,
    named_modes,
    notes_on_fixed_point,
    with_mark,
)

R = TypeVar("R", bound=MetricReport)


@dataclass(frozen=True, eq=False)  # fields are tensors
class Findings:
    """The numbers of a `Diagnosis`, which has the same attributes and tells of them."""

    stopping: Stopping
    layer_stopping: Stopping
    width: int
    dtype: torch.dtype
    layer: SolveReport
    solvers: tuple[SolveReport, ...]
    reference: SolveReport
    evaluation_times: tuple[float, ...]
    reports: tuple[MetricReport, ...]

    @property
    def batch(self) -> int:
        """Samples looked at, B."""
        return self.layer.samples

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be measured, and why."""
        missed = notes_on_fixed_point(self.reference, self.stopping)
        return (*missed, *(note for report in self.reports for note in report.notes))

    def named_solvers(self) -> list[tuple[str, SolveReport]]:
        """The layer's own solve and those to `stopping`, by the name to show."""
        shown = self.solvers if self.layer in self.solvers else (self.layer, *self.solvers)
        return [(with_mark(report.name, report is self.layer), report) for report in shown]

    def named_gradients(self) -> list[tuple[str, GradientReport]]:
        """The gradients of backward modes by the name to show, the layer's marked."""
        marks = [i == 0 for i in range(len(self.gradients))]
        return named_modes(self.gradients, marks, self.layer.solver)

    @property
    def spectral_radius(self) -> Tensor:
        """Largest modulus of an eigenvalue of J at the fixed point, float64, (B,)."""
        return next(self._of(SpectrumReport)).radius

    @property
    def spectral_norm(self) -> Tensor:
        """Largest singular value of J there, float64, (B,)."""
        return next(self._of(SpectrumReport)).norm

    @property
    def contraction(self) -> Tensor:
        """Factor by which plain iteration shrinks the residual in the end, float64, (B,)."""
        return next(self._of(ContractionReport)).factor

    @property
    def adjoint(self) -> SolveReport:
        """The adjoint solve with the layer's settings."""
        return next(self._of(GradientComparison)).adjoint

    @property
    def exact_adjoint(self) -> SolveReport:
        """The adjoint solve to rounding, which gives the exact gradient."""
        return next(self._of(GradientComparison)).exact_adjoint

    @property
    def gradients(self) -> tuple[GradientReport, ...]:
        """Every backward mode's gradient beside the exact one, the layer's own first."""
        return next(self._of(GradientComparison)).modes

    @property
    def precision(self) -> PrecisionReport:
        """How much the layer's gradient owes to where its forward and its adjoint solve stop."""
        return next(self._of(GradientComparison)).precision

    @property
    def evaluation_seconds(self) -> float:
        """Median of `evaluation_times`; NaN where there are none."""
        return statistics.median(self.evaluation_times) if self.evaluation_times else math.nan

    @property
    def path(self) -> PathReport | None:
        """Where other starts lead; `None` where there were none."""
        return next(self._of(PathReport), None)

    @property
    def coupling(self) -> CouplingReport | None:
        """How samples move with others; `None` where there is only one."""
        return next(self._of(CouplingReport), None)

    @property
    def deterministic(self) -> bool:
        """Whether the cell gives the same twice."""
        return next(self._of(DeterminismReport)).deterministic

    def _of(self, kind: type[R]) -> Iterator[R]:
        """What the metric that reports in this class found."""
        return (report for report in self.reports if isinstance(report, kind))

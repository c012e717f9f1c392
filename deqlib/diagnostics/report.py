"""What `diagnose` found, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backward import Backward
from ..solution import Solution, Status
from ..solvers import Solver
from ..stopping import Stopping
from .advice import advise
from .plot import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)  # as below: fields are tensors
class SolveReport:
    """One solve of the batch.

    Attributes:
        name: of the solver, told apart from the others.
        solver: its settings.
        trace: relative residual at every evaluation, (evaluations, B); infinite where it is not a number.
        relative_residual: of what the solve returned, its best iterate, (B,); infinite likewise.
        status: `deqlib.Status` codes, int64, (B,).
        nfe: evaluations of the cell on the batch.
    """

    name: str
    solver: Solver
    trace: Tensor
    relative_residual: Tensor
    status: Tensor
    nfe: int

    @classmethod
    def of(cls, name: str, solver: Solver, solution: Solution) -> SolveReport:
        """What to keep of a solution: not its tensors of the state's size."""
        trace, residual = solution.trace, solution.relative_residual
        assert trace is not None  # every solve here is measured
        assert residual is not None
        trace, residual = (
            t.detach().cpu().nan_to_num(nan=math.inf, posinf=math.inf) for t in (trace, residual)
        )
        return cls(name, solver, trace, residual, solution.status.cpu(), solution.nfe)

    @property
    def worst(self) -> Tensor:
        """Largest relative residual of the batch at every evaluation, (evaluations,)."""
        return self.trace.amax(1)

    @property
    def median(self) -> Tensor:
        """Median relative residual of the batch at every evaluation, (evaluations,)."""
        return self.trace.median(1).values

    @property
    def num_failed(self) -> int:
        """Samples that did not meet the tolerance, where there was one."""
        return sum(Status(code).is_failure for code in self.status.tolist())

    @property
    def outcome(self) -> str:
        """How many samples ended with each status, in words."""
        codes = self.status.tolist()
        return ", ".join(f"{codes.count(c)} {Status(c).name.lower()}" for c in sorted(set(codes)))


@dataclass(frozen=True)
class GradientReport:
    """The gradient of one backward mode beside the exact one.

    Attributes:
        name: of the mode, told apart from the others.
        mode: its settings.
        solver: of the forward solve: the layer's unless the mode refuses that.
        cosine: between the two gradients of all trainable tensors of the cell together, in [-1, 1]; NaN
            where one of them is zero or not finite; `None` where there are no such tensors.
        norm_ratio: norm of the mode's gradient of these tensors over that of the exact one.
        error: norm of the difference of the two over that of the exact one.
        input_cosine: as `cosine`, for the floating-point inputs together.
        input_norm_ratio: as `norm_ratio`, for the inputs.
        input_error: as `error`, for the inputs.
        evaluations: of the cell on the tape.
        products: vector-Jacobian products with the cell in the backward pass.
        saved_bytes: what autograd keeps for the backward pass, parameters and inputs left out.
    """

    name: str
    mode: Backward
    solver: Solver
    cosine: float | None
    norm_ratio: float | None
    error: float | None
    input_cosine: float | None
    input_norm_ratio: float | None
    input_error: float | None
    evaluations: int
    products: int
    saved_bytes: int

    @property
    def worst_cosine(self) -> float:
        """The smaller of the cosines there are; NaN where one cannot be told."""
        known = [cosine for cosine in (self.cosine, self.input_cosine) if cosine is not None]
        return math.nan if not known or any(map(math.isnan, known)) else min(known)


@dataclass(frozen=True, eq=False)
class PathReport:
    """Fixed points reached from several starts (path independence, Anil et al. 2022, arXiv 2211.09961).

    The starts are the layer's own and random ones of the solution's size. Every pair of fixed points that
    were reached counts.

    Attributes:
        distance: largest distance of a pair, relative to the larger norm of the two, (B,): 0 where all
            are one, 2 where two are opposite; NaN where fewer than two were reached.
        cosine: smallest cosine of a pair, (B,); NaN likewise.
        reached: from how many of the starts the solve converged, int64, (B,).
        num_starts: how many there were, the layer's own included.
    """

    distance: Tensor
    cosine: Tensor
    reached: Tensor
    num_starts: int


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `deqlib.diagnostics.diagnose` found; prints as a table. Tensors are on the CPU, off the tape.

    Attributes:
        stopping: the rule that solvers were compared by.
        width: numbers of one sample's state, D.
        dtype: the coarsest floating-point type that the cell computes in.
        layer: the layer's own solve, with its own solver and stopping rule.
        solvers: one solve to `stopping` for each solver compared, the layer's first.
        reference: the solve that goes on where the layer's solver left off, by `Auto` and to the rounding of
            the type; its value is the fixed point that everything below is taken at.
        spectral_radius: largest modulus of an eigenvalue of J, float64, (B,).
        spectral_norm: largest singular value of J, float64, (B,). Both NaN where J is not finite.
        contraction: factor by which the residual of plain iteration shrinks in the end, float64, (B,);
            NaN where it cannot be told, infinite where the iterates overflow.
        adjoint: the adjoint solve with the settings of the layer's `ImplicitDifferentiation`, or default
            ones where it has another mode.
        exact_adjoint: the tight adjoint solve behind the exact gradient.
        gradients: one entry for each backward mode compared, the layer's first.
        path: `None` without starts.
        deterministic: whether the cell gives the same twice.
        notes: what could not be measured, and why.
    """

    stopping: Stopping
    width: int
    dtype: torch.dtype
    layer: SolveReport
    solvers: tuple[SolveReport, ...]
    reference: SolveReport
    spectral_radius: Tensor
    spectral_norm: Tensor
    contraction: Tensor
    adjoint: SolveReport
    exact_adjoint: SolveReport
    gradients: tuple[GradientReport, ...]
    path: PathReport | None
    deterministic: bool
    notes: tuple[str, ...]

    @property
    def batch(self) -> int:
        """Samples looked at."""
        return len(self.layer.status)

    @property
    def suggestions(self) -> tuple[str, ...]:
        """What to change, in words, by the thresholds of `deqlib.diagnostics.advice`."""
        return advise(self)

    def summary(self) -> str:
        """All of it as text; also what `print` shows."""
        parts = [
            f"{self.batch} samples of {self.width} numbers, {_name(self.dtype)}, {_rule(self.stopping)}",
            _table(("solve", "evaluations", "worst", "median", "ended"), self._solves()),
            _table(("at the fixed point", "least", "median", "largest"), self._measures()),
        ]
        if self.gradients:
            head = (
                "gradient",
                "cosine",
                "norm ratio",
                "of inputs",
                "norm ratio",
                "on tape",
                "products",
                "kept",
            )
            parts.append(_table(head, self._modes()))
        parts.append("\n".join(f"note: {note}" for note in self.notes))
        parts.append("\n".join(f"- {line}" for line in self.suggestions))
        return "\n\n".join(filter(None, parts))

    def __str__(self) -> str:
        return self.summary()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Residual curves, sizes of J, cosines and path dependence as a figure of four panels.

        Args:
            path: where to save it, in a format that matplotlib knows by its ending.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = draw(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _solves(self) -> list[tuple[str, ...]]:
        solves = [*self.solvers] if self.layer in self.solvers else [self.layer, *self.solvers]
        named = [(report.name + " (layer)" * (report is self.layer), report) for report in solves]
        named += [("fixed point, tight", self.reference), ("adjoint", self.adjoint)]
        named += [("adjoint, tight", self.exact_adjoint)]
        return [
            (
                name,
                str(r.nfe),
                _number(float(r.relative_residual.max())),
                _number(float(r.relative_residual.median())),
                r.outcome,
            )
            for name, r in named
        ]

    def _measures(self) -> list[tuple[str, ...]]:
        rows = {
            "spectral radius of J": self.spectral_radius,
            "spectral norm of J": self.spectral_norm,
            "contraction of Picard": self.contraction,
        }
        if self.path is not None:
            rows["path dependence"] = self.path.distance
            rows["path cosine"] = self.path.cosine
            rows[f"starts that converge, of {self.path.num_starts}"] = self.path.reached
        return [(name, *map(_number, _range(values))) for name, values in rows.items()]

    def _modes(self) -> list[tuple[str, ...]]:
        return [
            (
                mode.name + f", by {type(mode.solver).__name__}" * (mode.solver != self.layer.solver),
                *map(_number, (mode.cosine, mode.norm_ratio, mode.input_cosine, mode.input_norm_ratio)),
                str(mode.evaluations),
                str(mode.products),
                _bytes(mode.saved_bytes),
            )
            for mode in self.gradients
        ]


def _range(values: Tensor) -> tuple[float, ...]:
    """Least, median and largest of what can be told."""
    known = values[~values.isnan()]
    if not known.numel():
        return math.nan, math.nan, math.nan
    return known.min().item(), known.median().item(), known.max().item()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [f"{cell:<{widths[0]}}" if i == 0 else f"{cell:>{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int):
        return str(value)
    small = value != 0 and abs(value) < 1e-2
    return f"{value:.1e}" if small or abs(value) >= 1e4 else f"{value:.3f}"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rule(stopping: Stopping) -> str:
    text = f"relative residual {stopping.rtol:.0e}"
    return f"{text} within {stopping.max_steps} steps"

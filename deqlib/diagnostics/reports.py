"""What is measured of one solve, of one gradient, and by one metric: plain, frozen data.

`diagnose` and `ablate` are collections of the same reports. Tables, plots and advice read them; nothing here
computes with a layer.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from .._settings import is_same
from ..backward import Backward
from ..solution import Solution, Status
from ..solvers import Solver
from ..stopping import Stopping

Record = dict[str, Any]  # what JSON can hold
WIDTH = 100  # columns of whatever is printed
UNCOUNTED = "what autograd keeps cannot be counted for a cell that uses transforms of torch.func inside"


@dataclass(frozen=True, eq=False)  # as below: fields are tensors, which have no single truth value
class SolveReport:
    """One solve of the batch.

    Attributes:
        name: of the solver, told apart from the others.
        solver: its settings.
        trace: relative residual at every evaluation, (evaluations, B); infinite where it is not a number.
        relative_residual: of what the solve returned, its best iterate, (B,); infinite likewise.
        status: `deqlib.Status` codes, int64, (B,).
        nfe: evaluations of the cell on the batch.
        times: seconds of a solve without gradient, one a round; empty where it was not timed.
    """

    name: str
    solver: Solver
    trace: Tensor
    relative_residual: Tensor
    status: Tensor
    nfe: int
    times: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, solver: Solver, solution: Solution) -> SolveReport:
        """What to keep of a measured solution: not its tensors of the state's size."""
        trace, residual = solution.trace, solution.relative_residual
        assert trace is not None  # every solve here is measured
        assert residual is not None
        trace, residual = (
            t.detach().cpu().nan_to_num(nan=math.inf, posinf=math.inf) for t in (trace, residual)
        )
        return cls(name, solver, trace, residual, solution.status.cpu(), solution.nfe)

    def __repr__(self) -> str:
        return shorten(f"SolveReport({self.name}: {self.outcome}; {self.nfe} evaluations)", WIDTH)

    @property
    def worst(self) -> Tensor:
        """Largest relative residual of the batch at every evaluation, (evaluations,)."""
        return self.trace.amax(1)

    @property
    def median(self) -> Tensor:
        """Median relative residual of the batch at every evaluation, (evaluations,)."""
        return self.trace.median(1).values

    @property
    def curve(self) -> tuple[float, ...]:
        """`worst` as numbers."""
        return tuple(self.worst.tolist())

    @property
    def residual(self) -> float:
        """Largest relative residual of a sample at what the solve returned."""
        return float(self.relative_residual.max())

    @property
    def evaluations(self) -> int:
        """`nfe`."""
        return self.nfe

    @property
    def samples(self) -> int:
        """B."""
        return len(self.status)

    @property
    def num_failed(self) -> int:
        """Samples that did not meet the tolerance, where there was one."""
        return sum(Status(code).is_failure for code in self.status.tolist())

    @property
    def converged(self) -> int:
        """Samples that did not fail."""
        return self.samples - self.num_failed

    @property
    def outcome(self) -> str:
        """How many samples ended with each status, in words."""
        codes = self.status.tolist()
        return ", ".join(f"{codes.count(c)} {Status(c).name.lower()}" for c in sorted(set(codes)))

    @property
    def seconds(self) -> float:
        """Median of `times`; NaN where there are none."""
        return _median(self.times)

    def record(self) -> Record:
        """For JSON: `None` stands for what is not finite."""
        return {
            "kind": "solver",
            "name": self.name,
            "settings": repr(self.solver),
            "evaluations": self.evaluations,
            "samples": self.samples,
            "converged": self.converged,
            "outcome": self.outcome,
            "residual": _finite(self.residual),
            "curve": [_finite(value) for value in self.curve],
            "seconds": _finite(self.seconds),
            "times": list(self.times),
        }


@dataclass(frozen=True)
class GradientReport:
    """The gradient of one backward mode beside the exact one.

    Attributes:
        name: of the mode, told apart from the others.
        mode: its settings.
        solver: of the forward solve: the layer's unless the mode refuses that.
        cosine: between the two gradients of all trainable tensors of the cell together, in [-1, 1]; NaN
            where one of them is zero or not finite; `None` where there are no such tensors.
        norm_ratio: norm of the mode's gradient of these tensors over that of the exact one; NaN where the
            exact one is zero; `None` likewise.
        error: norm of the difference of the two over that of the exact one; NaN where the exact one is zero
            or one of them is not finite; `None` likewise.
        input_cosine: as `cosine`, for the floating-point inputs together.
        input_norm_ratio: as `norm_ratio`, for the inputs.
        input_error: as `error`, for the inputs.
        evaluations: of the cell on the tape.
        products: vector-Jacobian products with the cell in the backward pass.
        saved_bytes: what autograd keeps for the backward pass, parameters and inputs left out; `None` where
            it cannot be counted, since the cell uses transforms of `torch.func`.
        times: seconds of solve and backward pass, one a round; empty where they were not timed.
        backward_times: seconds of the backward pass alone, likewise.
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
    saved_bytes: int | None
    times: tuple[float, ...] = ()
    backward_times: tuple[float, ...] = ()

    def __repr__(self) -> str:
        cosine, error = self.worst_cosine, self.worst_error
        return shorten(f"GradientReport({self.name}: cosine {cosine:.3g}, error {error:.3g})", WIDTH)

    @property
    def worst_cosine(self) -> float:
        """The smaller of the cosines there are; NaN where one cannot be told."""
        return min(known(self.cosine, self.input_cosine))

    @property
    def worst_error(self) -> float:
        """The larger of the errors there are; NaN where one cannot be told."""
        return max(known(self.error, self.input_error))

    @property
    def seconds(self) -> float:
        """Median of `times`; NaN where there are none."""
        return _median(self.times)

    @property
    def backward_seconds(self) -> float:
        """Median of `backward_times`; NaN where there are none."""
        return _median(self.backward_times)

    @property
    def forward_seconds(self) -> float:
        """Median of what is left of `times` without the backward pass; NaN where there are none."""
        pairs = zip(self.times, self.backward_times, strict=False)
        return _median(tuple(both - backward for both, backward in pairs))

    def record(self) -> Record:
        """For JSON: `None` stands for what is not finite, or not there."""
        return {
            "kind": "backward",
            "name": self.name,
            "settings": repr(self.mode),
            "solver": repr(self.solver),
            "cosine": _finite(self.cosine),
            "error": _finite(self.error),
            "input_cosine": _finite(self.input_cosine),
            "input_error": _finite(self.input_error),
            "evaluations": self.evaluations,
            "products": self.products,
            "saved_bytes": self.saved_bytes,
            "seconds": _finite(self.seconds),
            "forward_seconds": _finite(self.forward_seconds),
            "backward_seconds": _finite(self.backward_seconds),
            "times": list(self.times),
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class MetricReport(ABC):
    """What one metric of `deqlib.diagnostics.metrics` found. Subclasses are frozen dataclasses.

    Attributes:
        notes: what could not be measured, and why; default none.
    """

    notes: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `dataclass` writes a repr, of whole tensors, for every class that has none in its own body.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return shorten(f"{type(self).__name__}({', '.join(self.numbers()) or 'see its attributes'})", WIDTH)

    @abstractmethod
    def numbers(self) -> dict[str, Tensor]:
        """What there is to tell of every sample, (B,) each, by the words that a table shows for it.

        A table shows the smallest, the median and the largest number; NaN stands for one that is not known.
        """


def notes_on_fixed_point(reference: SolveReport, stopping: Stopping) -> Iterator[str]:
    """A note where there is no fixed point to measure at: `reference` missed the tolerance."""
    far = ~(reference.relative_residual <= (stopping.rtol or 0))
    if stopping.atol:  # a solve to rounding that succeeded is near enough for any absolute tolerance
        far &= torch.tensor([Status(code).is_failure for code in reference.status.tolist()])
    missed = int(far.sum())
    if missed:
        yield (
            f"no fixed point was found for {missed} of {reference.samples} samples: J and gradients are "
            "those at the best iterate"
        )


def tolerance_of(stopping: Stopping) -> str:
    """The tolerances of a rule that has any, in words."""
    parts = [f"relative residual {stopping.rtol:.0e}"] if stopping.rtol or not stopping.atol else []
    return " plus ".join(parts + [f"absolute residual {stopping.atol:.0e}"] * (stopping.atol > 0))


def with_mark(name: str, is_layers: bool) -> str:
    """The name as tables and figures show it: what the layer itself uses is marked."""
    return name + " (layer)" * is_layers


def named_modes(
    modes: Sequence[GradientReport], marks: Sequence[bool], layer_solver: Solver
) -> list[tuple[str, GradientReport]]:
    """Modes by the name to show: with the solver where it is not the layer's, and the layer's own marked."""
    return [
        (with_mark(mode.name + f", by {type(mode.solver).__name__}" * (not same), mark), mode)
        for mode, mark in zip(modes, marks, strict=True)
        for same in [is_same(mode.solver, layer_solver)]
    ]


def known(*values: float | None) -> list[float]:
    """The values that there are; NaN alone where there is none or one is NaN."""
    found = [value for value in values if value is not None]
    return [math.nan] if not found or any(map(math.isnan, found)) else found


def _median(times: tuple[float, ...]) -> float:
    return statistics.median(times) if times else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""An ablation of a layer: its cell with other solvers and other backward modes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._checks import check_instance, check_integer, check_number
from ..backward import (
    JFB,
    Backward,
    ImplicitDifferentiation,
    PhantomGradient,
    SharedInverse,
    StochasticJFB,
    Unroll,
)
from ..backward.base import on_tape
from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver
from ..stopping import Stopping
from .advice import ADJOINT_RESIDUAL
from .gradients import Gradients, Leaves, _accepted, compare, trainable
from .measure import _adjoints, _missed
from .plot import draw_ablation
from .report import GradientReport, SolveReport, _bytes, _name, _number, _rule, _table
from .subject import Subject, labels, normal, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]  # JSON

_SOLVER_HEAD = ("solver", "evaluations", "worst", "ended", "ms")
_BACKWARD_HEAD = ("backward", "cosine", "error", "of inputs", "error", "on tape", "products", "kept", "ms")


@dataclass(frozen=True)
class SolverRow:
    """One solver on the layer's cell.

    Attributes:
        name: told apart from the others.
        solver: its settings.
        evaluations: of the cell on the batch.
        samples: B.
        converged: how many of them reached the tolerance.
        outcome: how many ended with each status, in words.
        residual: largest relative residual of a sample at what the solve returned; infinite where one is
            not a number.
        curve: largest relative residual of a sample at every evaluation; infinite likewise.
        times: seconds of a solve without gradient, one a round.
    """

    name: str
    solver: Solver
    evaluations: int
    samples: int
    converged: int
    outcome: str
    residual: float
    curve: tuple[float, ...]
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times)

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
            "seconds": self.seconds,
            "times": list(self.times),
        }


@dataclass(frozen=True)
class BackwardRow:
    """One backward mode on the layer's cell.

    Attributes:
        name: told apart from the others.
        mode: its settings.
        solver: of the forward solve: the layer's unless the mode refuses that.
        cosine: between the mode's gradient and the exact one, of all trainable tensors of the cell together,
            in [-1, 1]; NaN where one of them is zero or not finite; `None` where there are no such tensors.
        error: norm of the difference of the two over that of the exact one; NaN and `None` likewise.
        input_cosine: as `cosine`, for the floating-point inputs together.
        input_error: as `error`, for the inputs.
        evaluations: of the cell on the tape.
        products: vector-Jacobian products with the cell in the backward pass.
        saved_bytes: what autograd keeps for the backward pass, parameters and inputs left out.
        times: seconds of solve and backward pass, one a round.
    """

    name: str
    mode: Backward
    solver: Solver
    cosine: float | None
    error: float | None
    input_cosine: float | None
    input_error: float | None
    evaluations: int
    products: int
    saved_bytes: int
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times)

    @property
    def worst_error(self) -> float:
        """The larger of the errors there are; NaN where one cannot be told."""
        known = [error for error in (self.error, self.input_error) if error is not None]
        return math.nan if not known or any(map(math.isnan, known)) else max(known)

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
            "seconds": self.seconds,
            "times": list(self.times),
        }


@dataclass(frozen=True)
class Ablation:
    """What `deqlib.diagnostics.ablate` measured; prints as two tables.

    Attributes:
        stopping: the rule of every solve.
        batch: samples, B.
        width: numbers of one sample's state, D.
        dtype: the coarsest floating-point type that the cell computes in.
        device: of the state.
        layer_solver: the layer's own, which modes ran with where they took it.
        solvers: one row a solver, in the order asked for.
        backwards: one row a backward mode, in the order asked for.
        notes: why errors may not be those of the gradient.
    """

    stopping: Stopping
    batch: int
    width: int
    dtype: torch.dtype
    device: torch.device
    layer_solver: Solver
    solvers: tuple[SolverRow, ...]
    backwards: tuple[BackwardRow, ...]
    notes: tuple[str, ...]

    def records(self) -> list[Record]:
        """All rows as dicts for JSON, solvers first; times in seconds, "kind" tells the two sorts apart."""
        return [row.record() for row in self.solvers] + [row.record() for row in self.backwards]

    def summary(self) -> str:
        """All of it as text; also what `print` shows. Times are medians."""
        where = f"{self.batch} samples of {self.width} numbers, {_name(self.dtype)} on {self.device.type}"
        parts = [f"{where}, {_rule(self.stopping)}"]
        if self.solvers:
            parts.append(_table(_SOLVER_HEAD, [self._solver(row) for row in self.solvers]))
        if self.backwards:
            parts.append(_table(_BACKWARD_HEAD, [self._backward(row) for row in self.backwards]))
        parts.append("\n".join(f"note: {note}" for note in self.notes))
        return "\n\n".join(filter(None, parts))

    def __str__(self) -> str:
        return self.summary()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Residuals against evaluations and time, errors of gradients against time and memory.

        A solve's time is spread evenly over its evaluations.

        Args:
            path: where to save it, in a format that matplotlib knows by its ending.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = draw_ablation(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _solver(self, row: SolverRow) -> tuple[str, ...]:
        return (
            row.name,
            str(row.evaluations),
            _number(row.residual),
            row.outcome,
            _number(1e3 * row.seconds),
        )

    def _backward(self, row: BackwardRow) -> tuple[str, ...]:
        return (
            row.name + f", by {type(row.solver).__name__}" * (row.solver != self.layer_solver),
            *map(_number, (row.cosine, row.error, row.input_cosine, row.input_error)),
            str(row.evaluations),
            str(row.products),
            _bytes(row.saved_bytes),
            _number(1e3 * row.seconds),
        )


def ablate(
    layer: ImplicitLayer,
    *inputs: Any,
    solvers: Sequence[Solver] | None = None,
    backwards: Sequence[Backward] | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    rounds: int = 5,
) -> Ablation:
    """Measure the layer's cell with other solvers and backward modes: what each costs, and what it gives.

    One rule ends every solve: the layer's, with `rtol` and `max_steps` in place of its own where they are
    given. Solvers are measured without gradient. Modes run with the layer's own solver, whatever `solvers`
    are; one that refuses it, as `Reversible` does, runs with one that it takes. The exact gradient that they
    are compared to is that of `diagnose`: of a random direction of a fixed seed, at the fixed point that the
    layer's solver leads to, both solved to rounding. `compact` is left out, and so is an adjoint's
    `warm_start`, which would begin at its own answer.

    All are run once before any is timed, and take turns in every round. On a device the host waits for it
    before and after each. As in `diagnose` a solve that fails is no error, the cell is measured as it is
    (call `layer.eval()` first where that matters), and the layer stays as it was: parameters, their
    gradients, buffers, and PyTorch's own random numbers. Works under `no_grad` and `inference_mode`.

    Cost: `rounds` + 1 solves for each solver, `rounds` + 1 solves and backward passes for each mode, and
    two tight solves. Memory: what the costliest mode keeps; `Unroll`, among the default ones, keeps every
    evaluation.

    Args:
        layer: whose cell is measured.
        *inputs: a batch of its inputs, of the size that times are to be told for.
        solvers: default the layer's own, Auto, Anderson, Broyden, NewtonKrylov and Picard.
        backwards: default the layer's own, ImplicitDifferentiation, SharedInverse, both forms of
            PhantomGradient, JFB and Unroll.
        rtol: relative tolerance; default the layer's, or 1e-3 where that has a fixed number of steps.
        max_steps: most steps of a solve; default the layer's, or 50 where that has a fixed number of steps.
        rounds: how often each is timed, at least 1.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a mode that takes none of the usual solvers, or
            a cell that breaks its contract.
    """
    solvers, backwards, stopping = _settings(layer, solvers, backwards, rtol, max_steps)
    check_integer("ablate", 1, rounds=rounds)
    partners = [_accepted(mode, layer.solver, stopping, owner="ablate: backwards") for mode in backwards]
    with untouched(layer, inputs):
        subject = Subject.of(layer, inputs, owner="ablate")
        device = tree_leaves(subject.z0)[0].device
        solver_rows = _solver_rows(subject, solvers, stopping, rounds, device)
        backward_rows: tuple[BackwardRow, ...] = ()
        notes: tuple[str, ...] = ()
        if backwards:
            modes = list(zip(map(_separate, backwards), partners, strict=True))
            reports, steps, notes = _gradients(layer, subject, modes, stopping)
            backward_rows = _backward_rows(backwards, reports, _times(steps, rounds, device))
        batch, width = subject.ravel(subject.z0).shape
        return Ablation(
            stopping, batch, width, subject.dtype, device, layer.solver, solver_rows, backward_rows, notes
        )


def _settings(
    layer: ImplicitLayer,
    solvers: Sequence[Solver] | None,
    backwards: Sequence[Backward] | None,
    rtol: float | None,
    max_steps: int | None,
) -> tuple[Sequence[Solver], Sequence[Backward], Stopping]:
    """Defaults filled in, the layer's own first."""
    check_instance("ablate", ImplicitLayer, "a deqlib.ImplicitLayer", layer=layer)
    if solvers is None:
        usual = (Auto(), Anderson(), Broyden(), NewtonKrylov(), Picard())
        solvers = (layer.solver, *(one for one in usual if one != layer.solver))
    if backwards is None:
        own, neumann = layer.backward_mode, PhantomGradient(form="neumann")
        modes = (ImplicitDifferentiation(), SharedInverse(), PhantomGradient(), neumann, JFB(), Unroll())
        backwards = (own, *(one for one in modes if one != own))
    for name, kind, given in (("solvers", Solver, solvers), ("backwards", Backward, backwards)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"ablate: {name} must be a list or tuple, got {type(given).__name__}")
        for i, one in enumerate(given):
            check_instance("ablate", kind, f"a deqlib {kind.__name__.lower()}", **{f"{name}[{i}]": one})
    stopping = layer.stopping
    if stopping.is_fixed:
        stopping = Stopping(norm_axes=stopping.norm_axes)
    if rtol is not None:
        check_number("ablate", 0, rtol=rtol)
        stopping = replace(stopping, rtol=rtol)
    if max_steps is not None:
        check_integer("ablate", 1, max_steps=max_steps)
        stopping = replace(stopping, max_steps=max_steps)
    return solvers, backwards, stopping


def _solver_rows(
    subject: Subject, solvers: Sequence[Solver], stopping: Stopping, rounds: int, device: torch.device
) -> tuple[SolverRow, ...]:
    """The first solve of each is what is told of, and warms up."""

    def prepared(solver: Solver) -> Callable[[], object]:
        return lambda: subject.solve(subject.z0, solver, stopping)

    reports = [
        SolveReport.of(name, solver, subject.solve(subject.z0, solver, stopping))
        for name, solver in zip(labels(solvers), solvers, strict=True)
    ]
    times = _times([prepared(solver) for solver in solvers], rounds, device)
    return tuple(
        SolverRow(
            name=report.name,
            solver=report.solver,
            evaluations=report.nfe,
            samples=len(report.status),
            converged=len(report.status) - report.num_failed,
            outcome=report.outcome,
            residual=float(report.relative_residual.max()),
            curve=tuple(report.worst.tolist()),
            times=seconds,
        )
        for report, seconds in zip(reports, times, strict=True)
    )


def _backward_rows(
    modes: Sequence[Backward], reports: Sequence[GradientReport], times: Sequence[tuple[float, ...]]
) -> tuple[BackwardRow, ...]:
    return tuple(
        BackwardRow(
            name=name,
            mode=mode,
            solver=report.solver,
            cosine=report.cosine,
            error=report.error,
            input_cosine=report.input_cosine,
            input_error=report.input_error,
            evaluations=report.evaluations,
            products=report.products,
            saved_bytes=report.saved_bytes,
            times=seconds,
        )
        for name, mode, report, seconds in zip(labels(modes), modes, reports, times, strict=True)
    )


def _gradients(
    layer: ImplicitLayer, subject: Subject, modes: Sequence[tuple[Backward, Solver]], stopping: Stopping
) -> tuple[list[GradientReport], list[Callable[[], object]], tuple[str, ...]]:
    """Every mode beside the exact gradient, what there is to time, and what is wrong with the exact one."""
    reference = subject.polish(subject.solve(subject.z0, layer.solver, stopping))
    z = subject.ravel(reference.value)
    cotangent = normal(z, torch.Generator().manual_seed(0))
    leaves, exact, notes = _exact(layer, subject, z, cotangent)
    reports, steps = [], []
    for mode, solver in modes:
        asked = ImplicitLayer(layer.cell, solver=solver, stopping=stopping)
        reports.append(compare(mode, type(mode).__name__, asked, subject, cotangent, leaves, exact))
        steps.append(_step(subject, mode, solver, stopping, cotangent, leaves))
    return reports, steps, (*_missed(reference, stopping), *notes)


def _exact(
    layer: ImplicitLayer,
    subject: Subject,
    z: Tensor,  # (B, D)
    cotangent: Tensor,  # (B, D)
) -> tuple[Leaves, Gradients, tuple[str, ...]]:
    """What gradients are taken of, the exact ones at z, and a note if they are not known."""
    if torch.is_autocast_enabled(z.device.type):
        torch.clear_autocast_cache()  # casts made without a graph would cut the one of this evaluation
    source, output = on_tape(subject.f, z)
    _, adjoint, u = _adjoints(layer.backward_mode, subject, source, output, cotangent)
    leaves = Leaves((), ())
    if output.requires_grad:
        leaves = Leaves(trainable(output, source, subject.cell, subject.floating), subject.floating)
    residual = float(adjoint.relative_residual.max())
    note = f"the exact gradient is not known: its adjoint is left with a residual of {residual:.0e}"
    return leaves, leaves.gradients(output, u), (note,) * (residual > ADJOINT_RESIDUAL)


def _step(
    subject: Subject, mode: Backward, solver: Solver, stopping: Stopping, cotangent: Tensor, leaves: Leaves
) -> Callable[[], object]:
    """What training does with the layer: solve, and send a gradient back."""

    def step() -> object:
        solution = fixed_point(
            subject.cell,
            subject.z0,
            subject.inputs,
            solver=solver,
            stopping=stopping,
            backward=mode,
            on_failure="ignore",
        )
        return leaves.gradients(subject.ravel(solution.value), cotangent)

    return step


def _separate(mode: Backward) -> Backward:
    """The mode without the objects in it that runs would change."""
    if isinstance(mode, ImplicitDifferentiation):
        return replace(mode, warm_start=None)
    if isinstance(mode, StochasticJFB) and mode.generator is not None:
        return replace(mode, generator=mode.generator.clone_state())
    return mode


def _times(
    contenders: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[tuple[float, ...]]:
    """Seconds of each, one a round; they take turns, so that whatever else goes on meets all alike."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for compute, seconds in zip(contenders, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            compute()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return [tuple(seconds) for seconds in times]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

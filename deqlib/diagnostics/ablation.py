"""An ablation of a layer: its cell with other solvers and other backward modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._checks import check_integer, check_number
from .._settings import is_same
from .._torch import tree_leaves
from ..backward import JFB, Backward, ImplicitDifferentiation, PhantomGradient, SharedInverse, Unroll
from ..layer import ImplicitLayer
from ..solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver
from ..stopping import Stopping
from .advice import ADJOINT_RESIDUAL
from .gradients import ExactGradient, compare_modes
from .plots import draw_ablation
from .reports import (
    UNCOUNTED,
    GradientReport,
    Record,
    SolveReport,
    named_modes,
    notes_on_fixed_point,
    with_mark,
)
from .settings import accepted_solver, check_layer, check_sequence, each_once, labels, with_tolerance
from .subject import Subject, normal, untouched
from .tables import headline, lines, page, timed_gradient_table, timed_solve_table
from .timing import interleaved_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)  # the reports hold tensors
class Ablation:
    """What `deqlib.diagnostics.ablate` measured; prints as two tables.

    Attributes:
        stopping: the rule of every solve.
        batch: samples, B.
        width: numbers of one sample's state, D.
        dtype: the coarsest floating-point type that the cell computes in.
        device: of the state.
        layer_solver: the layer's own, which modes ran with where they took it.
        layer_backward: the layer's own backward mode.
        solvers: one timed report a solver, in the order asked for.
        backwards: one timed report a backward mode, in the order asked for.
        notes: why errors may not be those of the gradient.
    """

    stopping: Stopping
    batch: int
    width: int
    dtype: torch.dtype
    device: torch.device
    layer_solver: Solver
    layer_backward: Backward
    solvers: tuple[SolveReport, ...]
    backwards: tuple[GradientReport, ...]
    notes: tuple[str, ...]

    def records(self) -> list[Record]:
        """All rows as dicts for JSON, solvers first; times in seconds, "kind" tells the two sorts apart."""
        return [row.record() for row in self.solvers] + [row.record() for row in self.backwards]

    def summary(self) -> str:
        """All of it as text; also what `print` and a prompt show. Times are medians."""
        return page(
            headline(self.batch, self.width, self.dtype, self.stopping, where=f" on {self.device.type}"),
            timed_solve_table(self._named_solvers()),
            timed_gradient_table(self._named_backwards()),
            lines("note: ", self.notes),
        )

    def __repr__(self) -> str:
        return self.summary()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Residuals against evaluations and time, errors of gradients against time and memory.

        A solve's time is spread evenly over its evaluations.

        Args:
            path: where to save it, in a format that matplotlib knows by its ending; default nowhere.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw_ablation(self._named_solvers(), self._named_backwards(), self.stopping.rtol, path)

    def _named_solvers(self) -> list[tuple[str, SolveReport]]:
        """Rows by the name to show."""
        return [(with_mark(row.name, is_same(row.solver, self.layer_solver)), row) for row in self.solvers]

    def _named_backwards(self) -> list[tuple[str, GradientReport]]:
        """Rows by the name to show."""
        marks = [is_same(row.mode, self.layer_backward) for row in self.backwards]
        return named_modes(self.backwards, marks, self.layer_solver)


def ablate(
    layer: ImplicitLayer,
    *inputs: Any,
    solvers: Sequence[Solver] | None = None,
    backwards: Sequence[Backward] | None = None,
    rtol: float | None = None,
    max_steps: int | None = None,
    rounds: int = 5,
    **keywords: Any,
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
        **keywords: inputs by name. One that has the name of a setting here goes by position.

    Returns:
        `Ablation`, one report a solver and one a mode.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a mode that takes none of the usual solvers, or
            a cell that breaks its contract.
    """
    solvers, backwards, stopping = _settings(layer, solvers, backwards, rtol, max_steps)
    check_integer("ablate", 1, rounds=rounds)
    partners = [accepted_solver(mode, layer.solver, stopping, "ablate: backwards") for mode in backwards]
    with untouched(layer, (inputs, keywords)):
        subject = Subject.of(layer, inputs, keywords, owner="ablate")
        batch, width = subject.ravel(subject.z0).shape
        device = tree_leaves(subject.z0)[0].device
        solves = _timed_solves(subject, solvers, stopping, rounds, device)
        modes: tuple[GradientReport, ...] = ()
        notes: tuple[str, ...] = ()
        if backwards:
            exact, notes = _exact_gradient(layer, subject, stopping)
            pairs = list(zip(backwards, partners, strict=True))
            modes = compare_modes(exact, pairs, stopping, rounds, device)
        if any(mode.saved_bytes is None for mode in modes):
            notes = (*notes, UNCOUNTED)
        return Ablation(
            stopping=stopping,
            batch=batch,
            width=width,
            dtype=subject.dtype,
            device=device,
            layer_solver=layer.solver,
            layer_backward=layer.backward,
            solvers=solves,
            backwards=modes,
            notes=notes,
        )


def _settings(
    layer: ImplicitLayer,
    solvers: Sequence[Solver] | None,
    backwards: Sequence[Backward] | None,
    rtol: float | None,
    max_steps: int | None,
) -> tuple[Sequence[Solver], Sequence[Backward], Stopping]:
    """Defaults filled in, the layer's own first."""
    check_layer("ablate", layer)
    if solvers is None:
        usual = (Auto(), Anderson(), Broyden(), NewtonKrylov(), Picard())
        solvers = each_once([layer.solver, *usual])
    if backwards is None:
        own, neumann = layer.backward, PhantomGradient(form="neumann")
        modes = (ImplicitDifferentiation(), SharedInverse(), PhantomGradient(), neumann, JFB(), Unroll())
        backwards = each_once([own, *modes])
    check_sequence("ablate", Solver, solvers=solvers)
    check_sequence("ablate", Backward, backwards=backwards)
    stopping = with_tolerance(layer.stopping)
    if rtol is not None:
        check_number("ablate", 0, rtol=rtol)
        stopping = replace(stopping, rtol=rtol)
    if max_steps is not None:
        check_integer("ablate", 1, max_steps=max_steps)
        stopping = replace(stopping, max_steps=max_steps)
    return solvers, backwards, stopping


def _timed_solves(
    subject: Subject, solvers: Sequence[Solver], stopping: Stopping, rounds: int, device: torch.device
) -> tuple[SolveReport, ...]:
    """The first solve of each is the one that is reported, and warms up."""
    solves = [partial(subject.solve, subject.z0, solver, stopping) for solver in solvers]
    reports = [
        SolveReport.of(name, solver, solve())
        for name, solver, solve in zip(labels(solvers), solvers, solves, strict=True)
    ]
    times = interleaved_times(solves, rounds, device)
    return tuple(replace(report, times=seconds) for report, seconds in zip(reports, times, strict=True))


def _exact_gradient(
    layer: ImplicitLayer, subject: Subject, stopping: Stopping
) -> tuple[ExactGradient, tuple[str, ...]]:
    """What modes are compared to, and notes where it is not known."""
    reference = subject.polish(subject.solve(subject.z0, layer.solver, stopping))
    z = subject.ravel(reference.value)
    cotangent = normal(z, torch.Generator().manual_seed(0))
    exact = ExactGradient.at(subject, z, cotangent, layer.backward)
    notes = [*notes_on_fixed_point(SolveReport.of("fixed point", Auto(), reference), stopping)]
    residual = exact.exact_adjoint.residual
    if residual > ADJOINT_RESIDUAL:
        notes.append(
            f"the exact gradient is not known: its adjoint is left with a residual of {residual:.0e}"
        )
    return exact, tuple(notes)

"""Measuring how a layer's solve and its gradients fare, and saying what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_instance, check_integer
from ..backward import JFB, Backward, ImplicitDifferentiation, PhantomGradient, SharedInverse
from ..layer import ImplicitLayer
from ..solution import Solution
from ..solvers import Anderson, Auto, Broyden, Picard, Solver
from ..stopping import Stopping
from .advice import advise
from .experiment import Experiment
from .findings import Findings
from .metrics import METRICS
from .plots import draw
from .reports import SolveReport, tolerance_of
from .settings import check_layer, check_sequence, each_once, labels, with_tolerance
from .subject import Subject, untouched
from .tables import (
    gradient_table,
    headline,
    lines,
    number_table,
    page,
    precision_table,
    solve_table,
    step_table,
)
from .timing import interleaved_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Diagnosis(Findings):
    """What `deqlib.diagnostics.diagnose` found; prints as a table. Tensors are on the CPU, off the tape.

    Attributes:
        stopping: the rule that solvers were compared by.
        layer_stopping: the layer's own.
        width: numbers of one sample's state, D.
        batch: samples, B.
        dtype: the coarsest floating-point type that the cell computes in.
        layer: the layer's own solve, with its own solver and stopping rule.
        solvers: one solve to `stopping` for each solver compared, the layer's first.
        reference: the solve that goes on where the layer's solver left off, by `Auto` and to the rounding of
            the type; its value is the fixed point that everything below is taken at.
        evaluation_times: seconds of one evaluation of the cell off the tape, one a round; empty where
            nothing was timed.
        reports: what each metric found, in the order of `deqlib.diagnostics.metrics`; the attributes below
            are theirs.
        spectral_radius: largest modulus of an eigenvalue of J, float64, (B,).
        spectral_norm: largest singular value of J, float64, (B,). Both NaN where J is not finite.
        contraction: factor by which the residual of plain iteration shrinks in the end, float64, (B,);
            NaN where it cannot be told, infinite where the iterates overflow.
        adjoint: the adjoint solve with the settings of the layer's `ImplicitDifferentiation`, or default
            ones where it has another mode.
        exact_adjoint: the tight adjoint solve behind the exact gradient.
        gradients: one entry for each backward mode compared, the layer's first.
        precision: errors of the layer's gradient that come from where its forward and its adjoint solve stop,
            and the samples that they come from.
        path: `None` without starts.
        deterministic: whether the cell gives the same twice.
        notes: what could not be measured, and why.
    """

    @property
    def suggestions(self) -> tuple[str, ...]:
        """What to change, in words, by the thresholds of `deqlib.diagnostics.advice`."""
        return advise(self)

    def summary(self) -> str:
        """All of it as text; also what `print` and a prompt show."""
        solves = [*self.named_solvers(), ("fixed point, tight", self.reference), ("adjoint", self.adjoint)]
        solves += [("adjoint, tight", self.exact_adjoint)]
        return page(
            headline(self.batch, self.width, self.dtype, self.stopping),
            solve_table(solves, self.evaluation_seconds),
            number_table(self.reports),
            gradient_table(self.named_gradients()),
            precision_table(self.precision),
            step_table(self.named_gradients(), self.evaluation_seconds),
            lines("note: ", self.notes),
            lines("- ", self.suggestions),
        )

    def __repr__(self) -> str:
        return self.summary()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Residual curves, sizes of J, cosines and path dependence as a figure of four panels.

        Args:
            path: where to save it, in a format that matplotlib knows by its ending; default nowhere.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw(self, path)


def diagnose(
    layer: ImplicitLayer,
    *inputs: Any,
    solvers: Sequence[Solver] | None = None,
    modes: Sequence[Backward] | None = None,
    stopping: Stopping | None = None,
    num_starts: int = 3,
    num_products: int = 24,
    rounds: int = 3,
    loss: Callable[[Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Diagnosis:
    """Measure how the layer's solve and its gradients fare on these inputs, and suggest what to change.

    Works where the solve fails too: then that is what it says. Everything is measured with the cell as it
    is (call `layer.eval()` first where that matters) and leaves the layer as it was: parameters, their
    gradients, buffers, and PyTorch's own random numbers. Works under `no_grad` and `inference_mode`.

    What is measured:

    - residual curves of the layer's solver and of others, to one stopping rule;
    - the Jacobian J at the fixed point that the layer's solver finds, made exact by `Auto`: spectral radius
      by Arnoldi's process with products J^T u (its eigenvalues are those of J), spectral norm by Lanczos'
      process with products J v too, in forward mode, or by differentiating twice where the cell does not
      support that, which is then noted;
    - the factor by which plain iteration shrinks the residual in the end;
    - the gradient of each backward mode, computed as the layer would with its own solver and stopping rule,
      beside the exact implicit gradient, with respect to the trainable tensors that the cell uses and to
      the floating-point inputs (a sparse one where it requires gradient);
    - the layer's gradient beside those with its forward solve, its adjoint, or both at rounding: which of the
      two tolerances costs how much, and on which samples;
    - seconds of every solve, and of a forward and a backward pass with every mode;
    - whether a sample's image moves when others do, which a solve takes for granted that it does not;
    - path independence: how far apart the fixed points are that several starts lead to (Anil et al. 2022,
      arXiv 2211.09961).

    A subclass of `ImplicitLayer` with a `forward` of its own is measured where that calls the cell first: its
    inputs are those that arrive there.

    Cost, for a layer that converges: some hundred evaluations of the cell on the batch. At most: `rounds` + 1
    solves of `max_steps` for each solver and mode, one for each start, 100 steps for each of `num_starts` + 3
    tight solves, and 3 `num_products` products. Memory: about `num_products` states beside what two
    evaluations keep for their backward pass, or what the costliest mode keeps.

    Args:
        layer: what to look at.
        *inputs: a batch of its inputs; a few samples are enough.
        solvers: compared to the layer's own; default Picard, Anderson and Broyden.
        modes: compared to the layer's own; default JFB, both forms of PhantomGradient, the shared inverse
            and ImplicitDifferentiation. A mode that refuses the layer's solver runs with one that it takes.
        stopping: the rule that solvers are compared by; default the layer's, or `Stopping()` where that is
            a fixed number of steps.
        num_starts: random starts, each of the size of the solution; 0 leaves path independence out.
        num_products: most products with J^T of one Arnoldi process; half as many for the spectral norm.
        rounds: how often solves and training steps are timed, in turns as in `ablate`; times are medians. 0
            leaves times out.
        loss: `loss(z) -> scalar`, whose gradient at the fixed point is the one sent back; default a random
            direction.
        generator: of all that is drawn; default a new one of a fixed seed.
        **keywords: inputs by name. One that has the name of a setting here goes by position.

    Returns:
        `Diagnosis`, numbers of every sample (B,).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a mode that takes none of the usual solvers, or
            a cell that breaks its contract.
    """
    solvers, modes, stopping = _settings(layer, solvers, modes, stopping)
    check_integer("diagnose", 0, num_starts=num_starts, rounds=rounds)
    check_integer("diagnose", 1, num_products=num_products)
    if loss is not None and not callable(loss):
        raise TypeError(f"diagnose: loss must be callable or None, got {type(loss).__name__}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    check_instance("diagnose", torch.Generator, "a torch.Generator or None", generator=generator)
    with untouched(layer, (inputs, keywords)):
        subject = Subject.of(layer, inputs, keywords, owner="diagnose")
        solves = [partial(subject.solve, subject.z0, solver, stopping) for solver in solvers]
        solutions = [solve() for solve in solves]
        evaluation, times = _times(subject, solves, rounds)
        compared = tuple(
            replace(SolveReport.of(name, solver, solution), times=seconds)
            for name, solver, solution, seconds in zip(
                labels(solvers), solvers, solutions, times, strict=True
            )
        )
        own = _own_solve(layer, subject, solutions[0], stopping)
        experiment = Experiment(
            layer=layer,
            subject=subject,
            modes=modes,
            stopping=stopping,
            num_starts=num_starts,
            num_products=num_products,
            rounds=rounds,
            loss=loss,
            generator=generator,
            solution=solutions[0],
            own=own,
            reference=subject.polish(solutions[0]),
        )
        reports = (metric(experiment) for metric in METRICS)
        return Diagnosis(
            stopping=stopping,
            layer_stopping=layer.stopping,
            width=experiment.z.shape[1],
            dtype=subject.dtype,
            layer=compared[0] if own is solutions[0] else _own_report(layer, compared[0].name, own),
            solvers=compared,
            reference=SolveReport.of("fixed point", Auto(), experiment.reference),
            evaluation_times=evaluation,
            reports=tuple(report for report in reports if report is not None),
        )


def _times(
    subject: Subject, solves: Sequence[Callable[[], Solution]], rounds: int
) -> tuple[tuple[float, ...], list[tuple[float, ...]]]:
    """Seconds of one evaluation off the tape, and of each solve, all in turns."""
    z = subject.ravel(subject.z0)

    def evaluate() -> None:
        with torch.no_grad():
            subject.f(z)

    first, *others = interleaved_times([evaluate, *solves], rounds, z.device)
    return first, others


def _own_solve(layer: ImplicitLayer, subject: Subject, compared: Solution, stopping: Stopping) -> Solution:
    """The solve as the layer does it: the one compared where its rule is the layer's."""
    if layer.stopping == stopping:
        return compared
    return subject.solve(subject.z0, layer.solver, replace(layer.stopping, measure=True))


def _own_report(layer: ImplicitLayer, name: str, own: Solution) -> SolveReport:
    """A solve by another rule than those it is compared with."""
    rule = layer.stopping
    name += f", {rule.max_steps} steps" if rule.is_fixed else f", {tolerance_of(rule)}"
    return SolveReport.of(name, layer.solver, own)


def _settings(
    layer: ImplicitLayer,
    solvers: Sequence[Solver] | None,
    modes: Sequence[Backward] | None,
    stopping: Stopping | None,
) -> tuple[list[Solver], list[Backward], Stopping]:
    """Defaults filled in, the layer's own first, everything once."""
    check_layer("diagnose", layer)
    if solvers is None:
        solvers = (Picard(), Anderson(), Broyden())
    if modes is None:
        phantoms = (PhantomGradient(), PhantomGradient(form="neumann"))
        modes = (JFB(), *phantoms, SharedInverse(), ImplicitDifferentiation())
    check_sequence("diagnose", Solver, solvers=solvers)
    check_sequence("diagnose", Backward, modes=modes)
    if stopping is None:
        stopping = with_tolerance(layer.stopping)
    check_instance("diagnose", Stopping, "a deqlib.Stopping or None", stopping=stopping)
    if stopping.is_fixed:
        raise ValueError(
            "diagnose: stopping must have a tolerance to compare solvers by, got a number of steps"
        )
    return each_once([layer.solver, *solvers]), each_once([layer.backward, *modes]), stopping

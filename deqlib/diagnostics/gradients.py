"""The exact gradient at a fixed point, and those of backward modes beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tree_leaves
from ..backward import Backward, ImplicitDifferentiation
from ..backward.graph import leaves_of
from ..counting import CountedCell
from ..fixed_point import fixed_point
from ..solution import Solution
from ..solvers import Auto, Solver
from ..state import small_dtype
from ..stopping import Stopping
from .memory import saved_bytes
from .reports import GradientReport, SolveReport, known
from .settings import labels, separate
from .subject import Linearization, Subject
from .timing import interleaved_stages


@dataclass(frozen=True)
class Leaves:
    """What gradients are taken of."""

    tensors: tuple[Tensor, ...]  # trainable tensors that the cell uses
    inputs: tuple[Tensor, ...]  # floating-point inputs

    @classmethod
    def of(cls, subject: Subject, point: Linearization) -> Leaves:
        """Those of the cell; none where its output carries no gradient.

        The tensors are the parameters of the cell and the leaves that its output depends on, each once.
        """
        if not point.output.requires_grad:
            return cls((), ())
        found = list(subject.cell.parameters()) if isinstance(subject.cell, nn.Module) else []
        if point.output.grad_fn is not None:
            reached = leaves_of(point.output, {point.source.grad_fn})
            found += [node.variable for node in reached if hasattr(node, "variable")]
        unique = {id(tensor): tensor for tensor in found if tensor.requires_grad}
        for tensor in subject.floating:
            unique.pop(id(tensor), None)
        return cls(tuple(unique.values()), subject.floating)

    def gradients(self, value: Tensor, cotangent: Tensor) -> Gradients:
        """Of <cotangent, value>, both (B, D); zeros where it does not depend on a leaf."""
        leaves = (*self.tensors, *self.inputs)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if leaves and value.requires_grad:
            # Retained: the graph may lead into one that the caller still needs.
            found = torch.autograd.grad(value, leaves, cotangent, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        return Gradients(filled[: len(self.tensors)], filled[len(self.tensors) :])


@dataclass(frozen=True)
class Gradients:
    """Of the trainable tensors and of the inputs."""

    tensors: list[Tensor]
    inputs: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """Errors of a gradient relative to the exact one.

    Attributes:
        error: of the trainable tensors together; `None` where there are none, NaN where it is not known.
        input_error: of the floating-point inputs together; likewise.
    """

    error: float | None
    input_error: float | None

    @classmethod
    def between(cls, found: Gradients, exact: Gradients) -> Difference:
        """Of two gradients of the same leaves."""
        return cls(
            _Comparison.of(found.tensors, exact.tensors).error,
            _Comparison.of(found.inputs, exact.inputs).error,
        )

    @property
    def worst(self) -> float:
        """The larger of the errors there are; NaN where one cannot be told."""
        return max(known(self.error, self.input_error))


@dataclass(frozen=True)
class ExactGradient:
    """The gradient at a fixed point with both solves at rounding, and what cheaper ones are compared by."""

    subject: Subject
    cotangent: Tensor  # the gradient sent back, (B, D)
    point: Linearization
    own: Tensor  # the adjoint with the settings of the layer, (B, D)
    solved: Tensor  # the adjoint at rounding, (B, D)
    leaves: Leaves
    values: Gradients
    adjoint: SolveReport  # the adjoint solve with the settings of the layer
    exact_adjoint: SolveReport  # gone on with from there, to rounding

    @classmethod
    def at(cls, subject: Subject, z: Tensor, cotangent: Tensor, mode: Backward) -> ExactGradient:
        """At the fixed point z (B, D), for a gradient (B, D) sent back to it.

        Args:
            subject: whose gradient it is.
            z: where it is taken.
            cotangent: the gradient sent back.
            mode: the layer's: its settings of the adjoint solve are tried first where it is
                `ImplicitDifferentiation`, the default ones where it is not.
        """
        point = Linearization.at(subject.f, z)
        if not isinstance(mode, ImplicitDifferentiation):
            mode = ImplicitDifferentiation()

        def solve(start: Tensor, solver: Solver, stopping: Stopping) -> Solution:
            with torch.no_grad():
                return fixed_point(
                    lambda u: point.transposed(u) + cotangent,
                    start,
                    solver=solver,
                    stopping=replace(stopping, norm_axes=None),  # the adjoint here is flat
                    on_failure="ignore",
                )

        own = solve(cotangent, mode.solver, replace(mode.stopping, measure=True))
        exact = solve(own.value, Auto(), subject.tight)
        leaves = Leaves.of(subject, point)
        return cls(
            subject=subject,
            cotangent=cotangent,
            point=point,
            own=own.value,
            solved=exact.value,
            leaves=leaves,
            values=leaves.gradients(point.output, exact.value),
            adjoint=SolveReport.of("adjoint", mode.solver, own),
            exact_adjoint=SolveReport.of("adjoint, tight", Auto(), exact),
        )

    def stages(
        self, mode: Backward, solver: Solver, stopping: Stopping
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Gradients]]:
        """What training does with a layer of these settings: solve, and send the gradient back."""
        return lambda: self._solved(self.subject.cell, mode, solver, stopping), self._sent_back

    def compare(self, name: str, mode: Backward, solver: Solver, stopping: Stopping) -> GradientReport:
        """What a layer of these settings would compute, beside the exact gradient."""
        counted = CountedCell(self.subject.cell)
        values: list[Tensor] = []
        kept: int | None

        def forward() -> Tensor:
            values.append(self._solved(counted, mode, solver, stopping))
            return values[-1]

        inputs_given = [leaf for leaf in tree_leaves(self.subject.inputs) if isinstance(leaf, Tensor)]
        try:
            kept = saved_bytes(forward, exclude=(*self.leaves.tensors, *inputs_given))
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            kept = None  # a cell that uses `torch.func` inside, which refuses to be looked at
            counted = CountedCell(self.subject.cell)
            forward()
        found = self._sent_back(values[-1])
        tensors = _Comparison.of(found.tensors, self.values.tensors)
        inputs = _Comparison.of(found.inputs, self.values.inputs)
        return GradientReport(
            name=name,
            mode=mode,
            solver=solver,
            cosine=tensors.cosine,
            norm_ratio=tensors.norm_ratio,
            error=tensors.error,
            input_cosine=inputs.cosine,
            input_norm_ratio=inputs.norm_ratio,
            input_error=inputs.error,
            evaluations=counted.recorded,
            products=counted.products,
            saved_bytes=kept,
        )

    def _solved(self, cell: Callable[..., Any], mode: Backward, solver: Solver, stopping: Stopping) -> Tensor:
        """The fixed point (B, D) with its graph."""
        solution = fixed_point(
            cell,
            self.subject.z0,
            self.subject.inputs,
            solver=solver,
            stopping=stopping,
            backward=mode,
            on_failure="ignore",
        )
        return self.subject.ravel(solution.value)

    def _sent_back(self, value: Tensor) -> Gradients:
        return self.leaves.gradients(value, self.cotangent)


def compare_modes(
    exact: ExactGradient,
    modes: Sequence[tuple[Backward, Solver]],
    stopping: Stopping,
    rounds: int,
    device: torch.device,
) -> tuple[GradientReport, ...]:
    """Every mode with the solver that it runs with, compared once before any is timed."""
    reports, steps = [], []
    for name, (mode, solver) in zip(labels([mode for mode, _ in modes]), modes, strict=True):
        own = separate(mode)
        reports.append(replace(exact.compare(name, own, solver, stopping), mode=mode))
        steps.append(exact.stages(own, solver, stopping))
    times = interleaved_stages(steps, rounds, device)
    return tuple(
        replace(report, times=both, backward_times=backward)
        for report, (both, backward) in zip(reports, times, strict=True)
    )


@dataclass(frozen=True)
class _Comparison:
    """Of two gradients of several tensors; `None` where there are no tensors, NaN where it is not known."""

    cosine: float | None
    norm_ratio: float | None
    error: float | None  # relative to the exact gradient

    @classmethod
    def of(cls, found: list[Tensor], exact: list[Tensor]) -> _Comparison:
        if not exact:
            return cls(None, None, None)
        inner = squared = squared_exact = squared_apart = 0.0
        for a, b in _flat(found, exact):
            inner += float(a @ b)
            squared += float(a @ a)
            squared_exact += float(b @ b)
            # Taken by itself: cosine and norm ratio tell it to the root of a rounding error only.
            squared_apart += float((a - b) @ (a - b))
        norm, norm_exact, apart = map(math.sqrt, (squared, squared_exact, squared_apart))
        norms = norm * norm_exact
        is_known = squared_exact > 0 and math.isfinite(squared_apart) and math.isfinite(squared_exact)
        return cls(
            cosine=inner / norms if 0 < norms < math.inf else math.nan,
            norm_ratio=norm / norm_exact if squared_exact > 0 else math.nan,
            error=apart / norm_exact if is_known else math.nan,
        )


def _flat(found: list[Tensor], exact: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of vectors, in a type that small numbers do not vanish in."""
    for pair in zip(found, exact, strict=True):
        one, other = (t.detach() for t in pair)
        if one.is_nested:
            one, other = (torch.cat([part.flatten() for part in t.unbind()]) for t in (one, other))
        if one.layout != torch.strided or other.layout != torch.strided:
            one, other = _side_by_side(one, other)
        a, b = (t.flatten().to(small_dtype(t)) for t in (one, other))
        yield a, b


def _side_by_side(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """What two tensors hold where any of them holds anything, if both are sparse; else all of them."""
    if torch.strided in (one.layout, other.layout):
        return one.to_dense(), other.to_dense()
    a, b = (t.to_sparse(layout=torch.sparse_coo).coalesce() for t in (one, other))
    if a.sparse_dim() != b.sparse_dim():
        return a.to_dense(), b.to_dense()

    def nothing(t: Tensor) -> Tensor:
        zeros = torch.zeros_like(t.values())
        return torch.sparse_coo_tensor(t.indices(), zeros, t.shape, check_invariants=False)

    return (a + nothing(b)).coalesce().values(), (b + nothing(a)).coalesce().values()

"""Gradients of backward modes beside the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..backward import Backward
from ..backward.base import ends
from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..solvers import Anderson, Broyden, Picard, ReversiblePicard, Solver
from ..solvers.base import small_dtype
from ..stopping import Stopping
from .memory import saved_bytes
from .report import GradientReport
from .subject import Subject


@dataclass(frozen=True)
class Leaves:
    """What gradients are taken of."""

    tensors: tuple[Tensor, ...]  # trainable tensors that the cell uses
    inputs: tuple[Tensor, ...]  # floating-point inputs

    def gradients(self, value: Tensor, cotangent: Tensor) -> Gradients:
        """Of <cotangent, value>; zeros where it does not depend on a leaf."""
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


def trainable(output: Tensor, source: Tensor, cell: object, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Leaves that `output` depends on, and the parameters of `cell`, without these inputs; each once."""
    found = list(cell.parameters()) if isinstance(cell, nn.Module) else []
    if output.grad_fn is not None:
        found += [node.variable for node in ends(output, {source.grad_fn}) if hasattr(node, "variable")]
    unique = {id(tensor): tensor for tensor in found if tensor.requires_grad}
    for tensor in inputs:
        unique.pop(id(tensor), None)
    return tuple(unique.values())


@dataclass
class Counted:
    """A cell that counts its evaluations on the tape and the products with its Jacobian."""

    cell: Callable[..., Any]
    evaluations: int = 0
    products: int = 0

    def __call__(self, z: Any, *inputs: Any) -> Any:
        """What the cell gives."""
        leaves, spec = tree_flatten(self.cell(z, *inputs))
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.evaluations += 1
                # A view: a hook on what the cell returns would stay on a tensor of the caller's. A product
                # passes all leaves of a state, so one of them is enough.
                leaves[index] = leaf.view_as(leaf)
                leaves[index].register_hook(self._note)
                break
        return tree_unflatten(leaves, spec)

    def _note(self, grad: Tensor) -> None:
        self.products += 1


def compare(
    mode: Backward,
    name: str,
    layer: ImplicitLayer,
    subject: Subject,
    cotangent: Tensor,  # (B, D)
    leaves: Leaves,
    exact: Gradients,
) -> GradientReport:
    """What a layer with this mode would compute, beside the exact gradients."""
    solver, stopping = _accepted(mode, layer.solver, layer.stopping), layer.stopping
    counted = Counted(subject.cell)
    values: list[Tensor] = []

    def forward() -> Tensor:
        solution = fixed_point(
            counted,
            subject.z0,
            subject.inputs,
            solver=solver,
            stopping=stopping,
            backward=mode,
            on_failure="ignore",
        )
        values.append(subject.ravel(solution.value))
        return values[0]

    kept = saved_bytes(forward, exclude=(*leaves.tensors, *leaves.inputs))
    found = leaves.gradients(values[0], cotangent)
    cosine, ratio = _beside(found.tensors, exact.tensors)
    input_cosine, input_ratio = _beside(found.inputs, exact.inputs)
    return GradientReport(
        name=name,
        mode=mode,
        solver=solver,
        cosine=cosine,
        norm_ratio=ratio,
        error=_error(found.tensors, exact.tensors),
        input_cosine=input_cosine,
        input_norm_ratio=input_ratio,
        input_error=_error(found.inputs, exact.inputs),
        evaluations=counted.evaluations,
        products=counted.products,
        saved_bytes=kept,
    )


def _accepted(mode: Backward, solver: Solver, stopping: Stopping, owner: str = "diagnose: modes") -> Solver:
    """The layer's solver, or the first of the usual ones that the mode works with."""
    reason = ""
    for candidate in (solver, Broyden(), Picard(), Anderson(), ReversiblePicard()):
        try:
            mode.check(candidate, stopping)
        except ValueError as error:
            reason = reason or str(error)
        else:
            return candidate
    raise ValueError(
        f"{owner} must work with the layer's solver, or Broyden, Picard, Anderson or ReversiblePicard, and "
        f"its stopping rule, got {mode}: {reason}"
    )


def _beside(found: list[Tensor], exact: list[Tensor]) -> tuple[float | None, float | None]:
    """Cosine and norm ratio of two gradients, each of several tensors."""
    if not exact:
        return None, None
    inner = squared = squared_exact = 0.0
    for ours, theirs in zip(found, exact, strict=True):
        a, b = (t.detach().flatten().to(small_dtype(t)) for t in (ours, theirs))
        inner += float(a @ b)
        squared += float(a @ a)
        squared_exact += float(b @ b)
    norms = math.sqrt(squared) * math.sqrt(squared_exact)
    cosine = inner / norms if 0 < norms < math.inf else math.nan
    ratio = math.sqrt(squared) / math.sqrt(squared_exact) if squared_exact > 0 else math.nan
    return cosine, ratio


def _error(found: list[Tensor], exact: list[Tensor]) -> float | None:
    """Relative distance, taken by itself: cosine and norm ratio tell it to the root of a rounding only."""
    if not exact:
        return None
    apart = squared_exact = 0.0
    for ours, theirs in zip(found, exact, strict=True):
        a, b = (t.detach().flatten().to(small_dtype(t)) for t in (ours, theirs))
        apart += float((a - b) @ (a - b))
        squared_exact += float(b @ b)
    known = squared_exact > 0 and math.isfinite(apart) and math.isfinite(squared_exact)
    return math.sqrt(apart) / math.sqrt(squared_exact) if known else math.nan

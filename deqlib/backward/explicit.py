"""Fixed points as a differentiable function of everything they depend on.

`_FixedPoint` takes the tensors of a fixed-point equation as explicit arguments. Its derivatives are fixed
points again, of linear equations: the adjoint u = J^T u + g for the backward pass, the tangent t = J t + b
for forward mode. Both are found by calling the same function, so derivatives of every order, and every
transform of `torch.func`, follow from these two rules and one for `vmap`, which makes one batch of two axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._compiler import uncompiled
from .._torch import forward_mode, unwrapped_if_dead
from ..solution import Solution
from ..state import Map
from .capture import ExplicitMap, primal, watched_constant
from .graph import refuse_batched_gradients

LinearSolve = Callable[[Map, Tensor, str], Solution]  # of an adjoint or a tangent, which is named


@dataclass(frozen=True, eq=False)
class Equation(ABC):
    """z = f(z; tensors), with all the tensors that f depends on spelled out.

    Attributes:
        solve: solves it, given f for some tensors and a starting point (B, D).
        linear_solve: solves the linear equations of its derivatives; `None`: to these it is a constant.
    """

    solve: Callable[[Map, Tensor], Solution]
    linear_solve: LinearSolve | None

    @abstractmethod
    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """f for these tensors, differentiable in all of them."""

    @abstractmethod
    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Equation, Sequence[Tensor]]:
        """`size` equations as one of (size * B, D), and its tensors.

        Args:
            size: how many.
            dims: the axis of each tensor along which the equations' own lie; `None`: they share it.
            randomness: as in `torch.vmap`.
            tensors: of the equations.
        """

    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """f(z; tensors), (B, D)."""
        return self.bind(tensors)(z)


@dataclass(frozen=True, eq=False)
class CellEquation(Equation):
    """That of the fixed point of a cell.

    Attributes:
        map: the cell, with the tensors that it depends on.
    """

    map: ExplicitMap

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """The map, its tensors replaced by these."""
        return lambda z: self.map(z, *tensors)

    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Equation, Sequence[Tensor]]:
        """See `Equation`."""
        return _Batched.of(self, size, dims, randomness), tensors


@dataclass(frozen=True, eq=False)
class _Linear(Equation):
    """The equation of a derivative, t = A t + b with A = J or J^T; its tensors are (b, z, *the primal's).

    Attributes:
        primal: the equation that the derivative is taken of.
        linearise: (f, z) -> A, the products of A with t.
        name: of the solve.
    """

    primal: Equation
    linearise: Callable[[Map, Tensor], Map]
    name: str

    @classmethod
    def of(cls, primal: Equation, linearise: Callable[[Map, Tensor], Map], name: str) -> _Linear:
        """Solved as the primal says."""
        linear_solve = primal.linear_solve
        assert linear_solve is not None
        return cls(lambda f, t: linear_solve(f, t, name), linear_solve, primal, linearise, name)

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """One evaluation of the primal's map serves all products."""
        b, z, *rest = tensors
        product = self.linearise(lambda z: self.primal.image(z, *rest), z)
        return lambda t: product(t) + b

    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Equation, Sequence[Tensor]]:
        """The linear equation of the batched primal: its map is linearised once, not at every product."""
        states = [_merge(tensor, dim, size) for tensor, dim in zip(tensors[:2], dims[:2], strict=True)]
        primal, rest = self.primal.batch(size, dims[2:], randomness, tensors[2:])
        return _Linear.of(primal, self.linearise, self.name), [*states, *rest]


@dataclass(frozen=True, eq=False)
class _Batched(Equation):
    """Many equations as one, whose batch is all their samples."""

    primal: Equation
    size: int
    dims: tuple[int | None, ...]
    randomness: str

    @classmethod
    def of(cls, primal: Equation, size: int, dims: Sequence[int | None], randomness: str) -> _Batched:
        """Solved as the primal is."""
        return cls(primal.solve, primal.linear_solve, primal, size, tuple(dims), randomness)

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """Each equation's map on its own samples."""
        batched = torch.vmap(self.primal.image, in_dims=(0, *self.dims), randomness=self.randomness)

        def image(z: Tensor) -> Tensor:
            apart = z.reshape(self.size, z.shape[0] // self.size, *z.shape[1:])
            together: Tensor = batched(apart, *tensors).flatten(0, 1)
            return together

        return image

    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Equation, Sequence[Tensor]]:
        """See `Equation`."""
        return _Batched.of(self, size, dims, randomness), tensors


@dataclass(eq=False)
class _Report:
    """What a solve tells besides tensors."""

    solution: Solution | None = None
    names: list[str] = field(default_factory=list)  # of the tensors that follow the value


_MEASURES = (
    *("residual", "relative_residual", "num_steps", "status", "sample_nfe", "trace", "method"),
    "place_steps",
)


def solve_explicitly(equation: Equation, z0: Tensor, tensors: Sequence[Tensor]) -> Solution:
    """The solution of `equation` at `tensors`; its value is differentiable in them, to every order.

    Its `state` is `None`.
    """
    report = _Report()
    value, *measures = _apply(equation, report, z0, *tensors)
    known: dict[str, Any] = dict(zip(report.names, measures, strict=True))
    found = report.solution
    assert found is not None
    rejections = {cause: known.pop("rejections " + cause) for cause in found.rejections}
    return replace(found, value=value, rejections=rejections, state=None, **known)


def solve_constant(f: Map, z0: Tensor, solve: Callable[[Map, Tensor], Solution]) -> Solution:
    """The solution under a function transform, its value a constant to derivatives."""
    with torch.no_grad():
        equation = CellEquation(solve, None, ExplicitMap.of(f, watched_constant(f, z0)))
        found = solve_explicitly(equation, z0, equation.map.tensors)
    return replace(found, nfe=found.nfe + 1)


def implicit_gradients(
    equation: Equation, g: Tensor, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the tensors that are wanted, differentiable in everything.

    By the implicit function theorem: u = J^T u + g, then u^T df/dtensor at z held constant.

    Args:
        equation: that `z` solves.
        g: gradient of the solution, (B, D).
        z: the solution, (B, D).
        tensors: that it was found for.
        wanted: for each of them, whether its gradient is wanted; it is `None` elsewhere.
    """
    adjoint = _Linear.of(equation, _pullback, "adjoint solve")
    u = solve_explicitly(adjoint, g, [g, z, *tensors]).value
    places = [i for i, want in enumerate(wanted) if want]
    results: list[Tensor | None] = [None] * len(tensors)
    if places:
        partial = _in_tensors(equation, z, tensors, places)
        pullback = torch.func.vjp(partial, *(tensors[i] for i in places))[1]
        for i, gradient in zip(places, pullback(u), strict=True):
            results[i] = gradient
    return results


def _implicit_tangent(
    equation: Equation,
    z: Tensor,
    tensors: Sequence[Tensor],
    places: Sequence[int],
    tangents: Sequence[Tensor],
) -> Tensor:
    """The tangent t = J t + b of the solution, b from the tangents of the tensors at these places."""
    partial = _in_tensors(equation, z, tensors, places)
    b = _pushforward(partial, *(tensors[i] for i in places))(*tangents)
    tangent = _Linear.of(equation, _pushforward, "tangent solve")
    found: Tensor = solve_explicitly(tangent, b, [b, z, *tensors]).value
    return found


def _in_tensors(
    equation: Equation, z: Tensor, tensors: Sequence[Tensor], places: Sequence[int]
) -> Callable[..., Tensor]:
    """f(z; tensors) as a function of the tensors at these places alone."""

    def image(*some: Tensor) -> Tensor:
        new = list(tensors)
        for place, tensor in zip(places, some, strict=True):
            new[place] = tensor
        return equation.image(z, *new)

    return image


def _pullback(f: Map, z: Tensor) -> Map:
    """Products of the transposed Jacobian of f at z with vectors."""
    back = torch.func.vjp(f, z)[1]

    def pull(u: Tensor) -> Tensor:
        product: Tensor = back(u)[0]
        return product

    return pull


def _pushforward(f: Callable[..., Tensor], *points: Tensor) -> Callable[..., Tensor]:
    """Products of the Jacobian of f at `points` with tangents.

    By reverse mode twice: the transpose of u -> J^T u is J. Operations without a forward-mode rule have that
    too, and the map is evaluated once for all products.
    """
    image, back = torch.func.vjp(f, *points)[:2]
    forth = torch.func.vjp(back, torch.zeros_like(image))[1]

    def push(*tangents: Tensor) -> Tensor:
        product: Tensor = forth(tangents)[0]
        return product

    return push


def _apply(equation: Equation, report: _Report, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _FixedPoint.apply(equation, report, z0, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _FixedPoint(torch.autograd.Function):
    """(equation, report, z0, *tensors) -> (value, *measures)."""

    @staticmethod
    def forward(equation: Equation, report: _Report, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            solution = equation.solve(equation.bind(tensors), z0)
        measures = {name: getattr(solution, name) for name in _MEASURES}
        measures |= {"rejections " + cause: counts for cause, counts in solution.rejections.items()}
        measures = {name: tensor for name, tensor in measures.items() if tensor is not None}
        report.solution, report.names = solution, list(measures)
        value: Tensor = solution.value
        return value, *measures.values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.equation, _, _, *tensors = inputs
        value, *measures = output
        ctx.num_measures = len(measures)
        ctx.mark_non_differentiable(*(output if ctx.equation.linear_solve is None else measures))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, *tensors)
        ctx.save_for_forward(value, *tensors)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Any) -> Any:
        g, z, *tensors = _alive(grads[0], *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[3:]
        if g is None or not any(wanted):
            return (None,) * (3 + len(tensors))
        return None, None, None, *implicit_gradients(ctx.equation, g, z, tensors, wanted)

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Any) -> Any:
        places = [i for i, tangent in enumerate(tangents[3:]) if tangent is not None]
        tangent = None
        given = _alive(*(tangents[3 + i] for i in places))
        refuse_batched_gradients(*given)
        with forward_mode(True):
            z, *tensors = (primal(tensor) for tensor in _alive(*ctx.saved_tensors))
            if places and ctx.equation.linear_solve is not None:
                tangent = _implicit_tangent(ctx.equation, z, tensors, places, given)
        return tangent, *(None for _ in range(ctx.num_measures))

    @staticmethod
    @uncompiled
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equation: Equation, report: _Report, z0: Tensor, *tensors: Tensor
    ) -> Any:
        size = info.batch_size
        together, tensors_ = equation.batch(size, in_dims[3:], info.randomness, tensors)
        outputs = _apply(together, report, _merge(z0, in_dims[2], size), *tensors_)
        axes = [0, *(1 if name == "trace" else 0 for name in report.names)]  # where each has its batch
        apart = (
            output.reshape(*output.shape[:axis], size, output.shape[axis] // size, *output.shape[axis + 1 :])
            for output, axis in zip(outputs, axes, strict=True)
        )
        return tuple(apart), tuple(axes)


def _alive(*tensors: Any) -> tuple[Any, ...]:
    """`tensors` without wrappers of transforms that ended; for plain functions PyTorch takes them off."""
    return tuple(unwrapped_if_dead(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors)


def _merge(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, D) with an axis of `size` at `dim`, or without -> (size * B, D)."""
    apart = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return apart.flatten(0, 1)

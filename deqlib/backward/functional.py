"""Fixed points as a differentiable function of everything they depend on.

`_FixedPoint` takes the tensors of a problem as explicit arguments. Its derivatives are fixed points again,
of linear problems: the adjoint u = J^T u + g for the backward pass, t = J t + b for the tangent. Both are
found by calling the same function, so derivatives of every order, and every transform of `torch.func`,
follow from these two rules and one for `vmap`, which makes one batch of the two axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..solution import Solution
from ..state import Map
from .capture import ExplicitMap, forward_mode, primal, watched_constant

Linear = Callable[[Map, Tensor, str], Solution]  # solves the adjoint and tangent problems, named


@dataclass(frozen=True, eq=False)
class Problem(ABC):
    """z = f(z; tensors), with all the tensors that f depends on spelled out."""

    @abstractmethod
    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """f(z; tensors), (B, D); differentiable in all of them."""

    @abstractmethod
    def solve(self, f: Map, z0: Tensor) -> Solution:
        """Solve by the settings that belong to the problem."""

    @property
    @abstractmethod
    def linear(self) -> Linear | None:
        """Solve the linear problems that this one's derivatives are; `None`: it has no derivatives."""

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """The map alone, for a solve that is not recorded."""
        return lambda z: self.image(z, *tensors)

    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Problem, Sequence[Tensor]]:
        """`size` problems as one of (size * B, D), and its tensors; `dims` says where each has the axis."""
        return _Batched(self, size, tuple(dims), randomness), tensors


@dataclass(frozen=True, eq=False)
class CellProblem(Problem):
    """The fixed point of a cell.

    Attributes:
        map: the cell, with what it depends on.
        settings: solves it.
        linear_solve: solves the problems of its derivatives; `None`: the solution is a constant to them.
    """

    map: ExplicitMap
    settings: Callable[[Map, Tensor], Solution]
    linear_solve: Linear | None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What the cell depends on."""
        return self.map.tensors

    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """The map, its tensors replaced by the given ones."""
        return self.map(z, *tensors)

    def solve(self, f: Map, z0: Tensor) -> Solution:
        """The solve of the caller."""
        return self.settings(f, z0)

    @property
    def linear(self) -> Linear | None:
        """As set."""
        return self.linear_solve


@dataclass(frozen=True, eq=False)
class _LinearProblem(Problem):
    """A problem that a derivative leads to; its tensors are (right side, z, *those of the primal)."""

    primal: Problem

    @property
    def linear(self) -> Linear | None:
        """That of the primal."""
        return self.primal.linear

    def batch(
        self, size: int, dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
    ) -> tuple[Problem, Sequence[Tensor]]:
        """The linear problem of the batched primal: its map is linearised once, not at every product."""
        states = [_merge(tensor, dim, size) for tensor, dim in zip(tensors[:2], dims[:2], strict=True)]
        primal, rest = self.primal.batch(size, dims[2:], randomness, tensors[2:])
        return type(self)(primal), [*states, *rest]


@dataclass(frozen=True, eq=False)
class Adjoint(_LinearProblem):
    """u = J^T u + g, tensors (g, z, *those of the primal)."""

    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """J^T u + g."""
        return self.bind(tensors)(z)

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """One evaluation of the primal's map serves all products."""
        g, z, *rest = tensors
        product = torch.func.vjp(lambda z: self.primal.image(z, *rest), z)[1]
        return lambda u: product(u)[0] + g

    def solve(self, f: Map, z0: Tensor) -> Solution:
        """By the settings for linear problems."""
        assert self.linear is not None
        return self.linear(f, z0, "adjoint solve")


@dataclass(frozen=True, eq=False)
class Tangent(_LinearProblem):
    """t = J t + b, tensors (b, z, *those of the primal)."""

    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """J t + b."""
        return self.bind(tensors)(z)

    def bind(self, tensors: Sequence[Tensor]) -> Map:
        """One evaluation of the primal's map serves all products."""
        b, z, *rest = tensors
        product = _pushforward(lambda z: self.primal.image(z, *rest), z)
        return lambda t: product(t) + b

    def solve(self, f: Map, z0: Tensor) -> Solution:
        """By the settings for linear problems."""
        assert self.linear is not None
        return self.linear(f, z0, "tangent solve")


@dataclass(frozen=True, eq=False)
class _Batched(Problem):
    """Many problems as one, whose batch is all their samples."""

    primal: Problem
    size: int
    dims: tuple[int | None, ...]
    randomness: str

    @property
    def linear(self) -> Linear | None:
        """That of the primal."""
        return self.primal.linear

    def image(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """Each problem's map on its own samples."""
        apart = z.reshape(self.size, z.shape[0] // self.size, *z.shape[1:])
        batched = torch.vmap(self.primal.image, in_dims=(0, *self.dims), randomness=self.randomness)
        together: Tensor = batched(apart, *tensors).flatten(0, 1)
        return together

    def solve(self, f: Map, z0: Tensor) -> Solution:
        """As the primal."""
        return self.primal.solve(f, z0)


@dataclass(eq=False)
class _Report:
    """What a solve tells besides tensors."""

    solution: Solution | None = None
    names: list[str] = field(default_factory=list)  # of the tensors that follow the value


_MEASURES = ("residual", "relative_residual", "num_steps", "status", "sample_nfe", "trace", "method")


def solve_explicitly(problem: Problem, z0: Tensor, tensors: Sequence[Tensor]) -> Solution:
    """The solution of `problem` at `tensors`; its value is differentiable in them, to every order.

    Its `state` is `None`.
    """
    report = _Report()
    value, *measures = _apply(problem, report, z0, *tensors)
    known = dict(zip(report.names, measures, strict=True))
    assert report.solution is not None
    found = report.solution
    return Solution(
        value=value,
        **{name: known.get(name) for name in _MEASURES},  # type: ignore[arg-type]
        nfe=found.nfe,
        methods=found.methods,
        rejections={cause: known["rejections " + cause] for cause in found.rejections},
        state=None,
    )


def solve_constant(f: Map, z0: Tensor, solve: Callable[[Map, Tensor], Solution]) -> Solution:
    """The solution under a function transform, its value a constant to derivatives."""
    with torch.no_grad():
        problem = CellProblem(ExplicitMap.of(f, watched_constant(f, z0)), solve, None)
        found = solve_explicitly(problem, z0, problem.tensors)
    return replace(found, nfe=found.nfe + 1)


def _apply(problem: Problem, report: _Report, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _FixedPoint.apply(problem, report, z0, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def product_with_tensors(
    problem: Problem, u: Tensor, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """u^T df/dtensor for those wanted, at z held constant."""
    places = [i for i, want in enumerate(wanted) if want]

    def image(*some: Tensor) -> Tensor:
        return problem.image(z, *_put(tensors, places, some))

    results: list[Tensor | None] = [None] * len(tensors)
    if places:
        product = torch.func.vjp(image, *(tensors[i] for i in places))[1]
        for i, gradient in zip(places, product(u), strict=True):
            results[i] = gradient
    return results


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


class _FixedPoint(torch.autograd.Function):
    """(problem, report, z0, *tensors) -> (value, *measures)."""

    @staticmethod
    def forward(problem: Problem, report: _Report, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            solution = problem.solve(problem.bind(tensors), z0)
        measures = {name: getattr(solution, name) for name in _MEASURES}
        measures |= {"rejections " + cause: counts for cause, counts in solution.rejections.items()}
        measures = {name: tensor for name, tensor in measures.items() if tensor is not None}
        report.solution, report.names = solution, list(measures)
        value: Tensor = solution.value
        return value, *measures.values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, _, _, *tensors = inputs
        value, *measures = output
        ctx.num_measures = len(measures)
        ctx.mark_non_differentiable(*(output if ctx.problem.linear is None else measures))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, *tensors)
        ctx.save_for_forward(value, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, z, *tensors = _alive(grads[0], *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[3:]
        if g is None or not any(wanted):
            return (None,) * (3 + len(tensors))
        u = solve_explicitly(Adjoint(ctx.problem), g, [g, z, *tensors]).value
        return None, None, None, *product_with_tensors(ctx.problem, u, z, tensors, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        problem = ctx.problem
        places = [i for i, tangent in enumerate(tangents[3:]) if tangent is not None]
        tangent = None
        tangents = _alive(*tangents)
        with forward_mode():
            z, *tensors = (primal(tensor) for tensor in _alive(*ctx.saved_tensors))
            if places and problem.linear is not None:

                def image(*some: Tensor) -> Tensor:
                    found: Tensor = problem.image(z, *_put(tensors, places, some))
                    return found

                push = _pushforward(image, *(tensors[i] for i in places))
                b = push(*(tangents[3 + i] for i in places))
                tangent = solve_explicitly(Tangent(problem), b, [b, z, *tensors]).value
        return tangent, *(None for _ in range(ctx.num_measures))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, report: _Report, z0: Tensor, *tensors: Tensor
    ) -> Any:
        size = info.batch_size
        together, tensors_ = problem.batch(size, in_dims[3:], info.randomness, tensors)
        outputs = _apply(together, report, _merge(z0, in_dims[2], size), *tensors_)
        axes = [0, *(1 if name == "trace" else 0 for name in report.names)]
        apart = (
            output.reshape(*output.shape[:axis], size, output.shape[axis] // size, *output.shape[axis + 1 :])
            for output, axis in zip(outputs, axes, strict=True)
        )
        return tuple(apart), tuple(axes)


def _alive(*tensors: Any) -> tuple[Any, ...]:
    """`tensors` without wrappers of transforms that ended; for plain functions PyTorch takes them off."""
    take_off = torch._C._functorch.unwrap_if_dead
    return tuple(take_off(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors)


def _put(tensors: Sequence[Tensor], places: Sequence[int], new: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` with those at `places` replaced."""
    result = list(tensors)
    for place, tensor in zip(places, new, strict=True):
        result[place] = tensor
    return result


def _merge(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, D) with an axis of `size` at `dim`, or without -> (size * B, D)."""
    apart = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return apart.flatten(0, 1)

"""Solutions of recorded equations, differentiable to every order by plain autograd.

An equation x = f(x) + b is given by one evaluation on the tape: `image` = f, recorded from `source`, which
stands for x. The solution gets a backward pass that solves the adjoint u = J^T u + g with products from that
graph. Where the backward pass is itself recorded (`create_graph=True`), its result must be a function of
everything, and three things see to that, with no further evaluation of f:

- u is the solution of an equation too, whose image J^T u was recorded from a stand-in for u. So it is made
  the same way, and so on for every order.
- What was recorded from a stand-in does not depend on what that stands for, since the tape begins there.
  `_rejoin` lets it: it sends the gradient at the stand-in on.
- Gradients of all that f captured leave the graph of the evaluation at its edges, see `exits.py`.

The image may be recorded from further stand-ins, the *cuts*, of tensors called *points*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .._compiler import uncompiled
from .._torch import forward_mode, is_transformed
from ..state import Map
from .exits import Exit, deliver, exits_of, pull
from .graph import VectorJacobianProduct, refuse_batched_gradients, vector_jacobian_product
from .tape import start_of_tape

LinearSolve = Callable[[Map, Tensor], Tensor]  # (u -> J^T u + g, where to begin) -> u, all (B, D)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What an equation is solved by.

    Attributes:
        first: solves the adjoint of a backward pass that is not recorded.
        again: solves the adjoints of those that are.
        anew: records the image at a solution once more; gives the point, a start of the tape, and the image.
    """

    first: LinearSolve
    again: LinearSolve
    anew: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def implicit(
    how: Recorded,
    value: Tensor,
    image: Tensor,
    source: Tensor,
    *,
    addend: Tensor | None = None,
    cuts: Sequence[Tensor] = (),
    points: Sequence[Tensor] = (),
) -> Tensor:
    """`value`, (B, D), as the solution x of x = f(x) + b.

    Args:
        how: to solve the adjoints.
        value: the solution, found off the tape.
        image: f(x), recorded.
        source: what it was recorded from, see `tape.start_of_tape`.
        addend: b; its gradient is u.
        cuts: further stand-ins that the image was recorded from.
        points: what they stand for.
    """
    solved: Tensor = _Implicit.apply(how, len(cuts), value, addend, image, source, *cuts, *points)  # type: ignore[no-untyped-call]
    return solved


class _Implicit(torch.autograd.Function):
    """See `implicit`."""

    @staticmethod
    def forward(
        ctx: Any, how: Recorded, num_cuts: int, value: Tensor, addend: Tensor | None, *recorded: Tensor
    ) -> Tensor:
        ctx.how, ctx.num_cuts = how, num_cuts
        result = value.detach()
        ctx.starts = [cut.grad_fn for cut in recorded[1 : 2 + num_cuts]]
        ctx.save_for_backward(result, *recorded)
        return result

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        refuse_batched_gradients(g)
        # Taken once: under activation checkpointing a second time is an error.
        x, image, source, *others = ctx.saved_tensors
        cuts, points = others[: ctx.num_cuts], others[ctx.num_cuts :]
        is_taken_apart = not isinstance(ctx, BackwardCFunction)
        if is_taken_apart:
            return _of_compiled_autograd(ctx.how, g, x, len(ctx.needs_input_grad))
        if torch.is_grad_enabled():
            compute = partial(_of_solution, ctx.how, x, image, source, cuts, points)
            (u, at_image, *at_points), exits, left = _for_each(compute, [g])
            deliver(exits, left)
        else:
            u = at_image = _adjoint(ctx.how.first, g, image, source)
            at_points = _gradients([image], cuts, [u]) if cuts else []
        addend = u if ctx.needs_input_grad[3] else None
        return None, None, None, addend, at_image, None, *[None] * len(cuts), *at_points


def _of_compiled_autograd(how: Recorded, g: Tensor, x: Tensor, number: int) -> tuple[Tensor | None, ...]:
    """What `_Implicit.backward` returns where compiled autograd calls it, with a context of its own.

    That has taken the graph of the evaluation apart, so products with J^T need one anew. The gradient of the
    image goes on through what was taken apart. None may be left out there: the source gets zeros.
    """
    if torch.is_grad_enabled() or how.anew is None:
        raise RuntimeError(
            "compiled autograd (torch._dynamo.config.compiled_autograd) does not differentiate a solve "
            "twice: call backward() without it"
        )
    with torch.enable_grad():
        source, image = how.anew(x)
    u = _adjoint(how.first, g, image, source)
    return None, None, None, None, u, torch.zeros_like(g), *[None] * (number - 6)


# The gradients of tensors, those that leave the graph where, and what leaves there
Found = tuple[list[Tensor | None], list[Exit], list[Tensor | None]]


def _of_solution(
    how: Recorded,
    x: Tensor,
    image: Tensor,
    source: Tensor,
    cuts: Sequence[Tensor],
    points: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> Found:
    """The adjoint, what the image gets, and gradients of the points, all as functions of everything."""
    (g,) = vectors
    cuts, points = [source, *cuts], [x, *points]
    if not any(exits_of([image], cuts)[1]):
        return [g, g, *[None] * (len(points) - 1)], [], []  # f is a constant: the gradient goes on as it is
    with torch.no_grad():
        found = _adjoint(how.again, g.detach(), image, source)
    stand_in = start_of_tape(found)
    at_cuts, exits, left = pull([stand_in], [image], cuts)
    u = g
    if at_cuts[0] is not None:
        u = implicit(how, found, at_cuts[0], stand_in, addend=g, cuts=cuts, points=points)
    joined = _rejoin([*at_cuts[1:], *left], [*cuts, stand_in], [*points, u])
    n = len(cuts) - 1
    return [u, torch.zeros_like(g), *joined[:n]], exits, joined[n:]


def _adjoint(solve: LinearSolve, g: Tensor, image: Tensor, source: Tensor) -> Tensor:
    """The solution of u = J^T u + g, a constant."""

    def product(u: Tensor) -> Tensor:
        return vector_jacobian_product(u, image, source)

    if is_transformed():  # as where `torch.vmap` takes a backward pass for many g
        many: Tensor = _Adjoint.apply(solve, product, g)  # type: ignore[no-untyped-call]
        return many
    return solve(lambda u: product(u) + g, g)


class _Adjoint(torch.autograd.Function):
    """The adjoint of a plain graph; for many g they are one batch of two axes."""

    @staticmethod
    def forward(solve: LinearSolve, product: VectorJacobianProduct, g: Tensor) -> Tensor:
        return solve(lambda u: product(u) + g, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.solve, ctx.product, _ = inputs

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_mode(True):  # for an outer level
            return _Adjoint.apply(ctx.solve, ctx.product, tangents[2])  # type: ignore[no-untyped-call]

    @staticmethod
    @uncompiled
    def vmap(
        info: Any, in_dims: Any, solve: LinearSolve, product: VectorJacobianProduct, g: Tensor
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        apart = g.movedim(in_dims[2], 0)
        many = torch.vmap(product)

        def together(u: Tensor) -> Tensor:
            found: Tensor = many(u.reshape(apart.shape)).flatten(0, 1)
            return found

        u: Tensor = _Adjoint.apply(solve, together, apart.flatten(0, 1))  # type: ignore[no-untyped-call]
        return u.reshape(size, *apart.shape[1:]), 0


def _rejoin(
    tensors: Sequence[Tensor | None], cuts: Sequence[Tensor], points: Sequence[Tensor]
) -> list[Tensor | None]:
    """`tensors`, recorded from `cuts`, as functions of the `points` that these stand for."""
    found = list(tensors)
    some = [(i, tensor) for i, tensor in enumerate(found) if tensor is not None]
    inside = exits_of([tensor for _, tensor in some], cuts)[1]
    places = [i for (i, _), there in zip(some, inside, strict=True) if there]
    if places:
        joined = _Rejoined.apply(len(cuts), *cuts, *points, *(found[i] for i in places))  # type: ignore[no-untyped-call]
        for i, tensor in zip(places, joined, strict=True):
            found[i] = tensor
    return found


class _Rejoined(torch.autograd.Function):
    """See `_rejoin`."""

    @staticmethod
    def forward(ctx: Any, num_cuts: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.num_cuts = num_cuts
        ctx.set_materialize_grads(False)
        ctx.starts = [cut.grad_fn for cut in tensors[:num_cuts]]
        ctx.save_for_backward(*tensors)
        return tuple(tensor.detach() for tensor in tensors[2 * num_cuts :])

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *gradients: Any) -> Any:
        tensors, n = ctx.saved_tensors, ctx.num_cuts
        cuts, points, recorded = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        places = [i for i, g in enumerate(gradients) if g is not None]
        vectors, outputs = [gradients[i] for i in places], [recorded[i] for i in places]
        passed = list(gradients)
        if torch.is_grad_enabled():
            compute = partial(_of_recorded, outputs, cuts, points)
            at_points, exits, left = _for_each(compute, vectors)
            deliver(exits, left)
            for i in places:
                passed[i] = torch.zeros_like(gradients[i])
        else:
            at_points = _gradients(outputs, cuts, vectors)
        return None, *[None] * n, *at_points, *passed


def _of_recorded(
    outputs: Sequence[Tensor], cuts: Sequence[Tensor], points: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Found:
    """Gradients of the points, as functions of everything."""
    stand_ins = [start_of_tape(vector) for vector in vectors]
    at_cuts, exits, left = pull(stand_ins, outputs, cuts)
    joined = _rejoin([*at_cuts, *left], [*cuts, *stand_ins], [*points, *vectors])
    return joined[: len(cuts)], exits, joined[len(cuts) :]


def _for_each(compute: Callable[[Sequence[Tensor]], Found], vectors: Sequence[Tensor]) -> Found:
    """`compute(vectors)`; where `torch.vmap` takes the backward pass for many, of one after the other."""
    if not is_transformed():
        return compute(vectors)
    others = _Others()
    tensors = iter(_Each.apply(compute, others, *vectors))  # type: ignore[no-untyped-call]
    found = [next(tensors) if there else None for there in others.is_there]
    return found[: others.number], others.exits, found[others.number :]


@dataclass(eq=False)
class _Others:
    """What is found besides tensors: the places where one is, the exits, and how many are not for these."""

    is_there: list[bool] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    number: int = 0


class _Each(torch.autograd.Function):
    """See `_for_each`."""

    @staticmethod
    def forward(compute: Any, others: _Others, *vectors: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "a backward pass with create_graph=True through a solve that was made outside of the transform: "
            "torch.vmap alone works around it; make the solve inside the function that is transformed"
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: the results have graphs of their own."""

    @staticmethod
    @uncompiled
    def vmap(
        info: Any, in_dims: Any, compute: Any, others: _Others, *vectors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        slices = [
            [vector] * info.batch_size if dim is None else vector.unbind(dim)
            for vector, dim in zip(vectors, in_dims[2:], strict=True)
        ]
        each = [_for_each(compute, one) for one in zip(*slices, strict=True)]
        columns = list(zip(*([*found, *left] for found, _, left in each), strict=True))
        others.is_there = [column[0] is not None for column in columns]
        others.exits, others.number = each[0][1], len(each[0][0])
        stacked = tuple(torch.stack(column) for column in columns if column[0] is not None)
        return stacked, (0,) * len(stacked)


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that are not recorded; the graph stays."""
    if not outputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True))

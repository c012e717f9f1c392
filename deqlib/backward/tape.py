"""The pieces that backward modes are made of: what runs off the tape, what on it, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .._autocast import autocast_dtype
from .._compiler import uncompiled
from .._torch import (
    forget_cached_parametrizations,
    forward_mode,
    is_forward_mode_active,
    is_transformed,
)
from ..confirmation import Confirm
from ..solution import Solution
from ..state import Map
from ..steps import Course
from .base import Solve
from .capture import primal
from .explicit import solve_constant
from .graph import depends_on_leaves, refuse_batched_gradients, vector_jacobian_product

AdjointRule = Callable[..., Tensor]  # (g, vjp, *kept) -> u, g and u (B, D), vjp a `VectorJacobianProduct`
# (g, wanted, *saved) -> gradients of the first inputs, the others get none; `wanted` says which are asked for
GradientRule = Callable[..., Sequence[Tensor | None]]


def solve_off_tape(f: Map, z0: Tensor, solve: Solve, *, course: Course | None = None) -> Solution:
    """The fixed point as a constant; it leaves no trace for the evaluations on the tape that follow.

    Args:
        f: the map.
        z0: starting point, (B, D); no gradient reaches it.
        solve: see `Solve`.
        course: a fixed number of steps for each sample; default as the caller's rule says.
    """
    if is_transformed():
        return solve_constant(f, z0, lambda f, z0: solve(f, z0, course=course))
    with torch.no_grad():
        solution = solve(f, z0.detach(), course=course)
    _forget_constants(z0)
    return solution


def solve_unconfirmed(f: Map, z0: Tensor, solve: Solve) -> tuple[Solution, Confirm]:
    """As `solve_off_tape`, for a mode that evaluates `f` at the solution's value next, on the tape.

    Args:
        f: the map.
        z0: starting point, (B, D); no gradient reaches it.
        solve: see `Solve`.

    Returns:
        The solution, and a function that takes f at its value, (B, D), and returns the solution, settled by
        that where the whole batch was not measured at the value before; see `Solve.unconfirmed`.
    """
    if is_transformed():
        solution = solve_off_tape(f, z0, solve)
        return solution, lambda image: solution
    with torch.no_grad():
        solution, confirm = solve.unconfirmed(f, z0.detach())
    _forget_constants(z0)
    return solution, confirm


def _forget_constants(z0: Tensor) -> None:
    """Empty caches of what was computed without a graph, before something is recorded."""
    if torch.is_grad_enabled():
        # Autocast caches the weights it casts. Where PyTorch casts them under no_grad without a graph, using
        # them again on the tape cuts the weights' gradient (github.com/pytorch/pytorch/issues/48049).
        if autocast_dtype(z0.device.type) is not None:
            torch.clear_autocast_cache()
        forget_cached_parametrizations()  # likewise computed without a graph


def on_tape(f: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    """One evaluation on the tape at `z`, (B, D).

    Returns:
        The point, from which J is recorded and at which the graph ends, and its image, both (B, D).

    Raises:
        RuntimeError: under a transform of `torch.func` or forward-mode differentiation.
    """
    source = start_of_tape(z)
    return source, f(source)


def start_of_tape(z: Tensor) -> Tensor:
    """`z` as a point from which J is recorded, and at which the graph ends.

    Raises:
        RuntimeError: under a transform of `torch.func`, whose graphs cannot be kept, or forward-mode
            differentiation.
    """
    _refuse_transforms()
    return with_gradient(z, _no_gradient, others=[z.detach().requires_grad_()])


def attach(
    solution: Solution,
    output: Tensor,
    adjoint: AdjointRule,
    source: Tensor,
    nfe: int,
    kept: Sequence[Tensor] = (),
) -> Solution:
    """`solution`, the gradient g of whose value goes into the graph of `output` as `adjoint(g, vjp, *kept)`.

    The value refuses to be differentiated twice.

    Args:
        solution: found off the tape.
        output: (B, D), evaluated on the tape at the fixed point.
        adjoint: turns g (B, D) into the gradient of `output`, with the products `vjp(u)` = J^T u.
        source: the point that `output` was evaluated at, see `on_tape`.
        nfe: evaluations spent on `output`.
        kept: what else the adjoint needs. Autograd keeps it: it goes with the graph, is seen by hooks on
            saved tensors, and activation checkpointing computes it again.

    Raises:
        RuntimeError: as `on_tape`.
    """
    _refuse_transforms()
    solution = replace(solution, nfe=solution.nfe + nfe)
    if not depends_on_leaves(output):
        return solution

    def rule(g: Tensor, _: Sequence[bool], output: Tensor, source: Tensor, *kept: Tensor) -> list[Tensor]:
        refuse_second_order()
        return [adjoint(g, lambda u: vector_jacobian_product(u, output, source), *kept)]

    return replace(solution, value=with_gradient(solution.value, rule, [output, source, *kept]))


def straight_through(solution: Solution, output: Tensor, nfe: int) -> Solution:
    """`solution`, the gradient of whose value goes to `output` as it is; it refuses a second derivative.

    Works under transforms of `torch.func`, in forward mode, and under `torch.compile`.

    Args:
        solution: found off the tape.
        output: (B, D), evaluated on the tape.
        nfe: evaluations spent on `output`.
    """
    solution = replace(solution, nfe=solution.nfe + nfe)
    if not (output.requires_grad or is_transformed()):
        return solution
    return replace(solution, value=_passing(output, solution.value))


def with_first_step(solution: Solution, f: Map, z0: Tensor) -> Solution:
    """`solution`, a sample of which that stayed at the start has the gradient of one step from there.

    No step led to such a value, as where the start already meets the tolerance, so the gradient of the
    iteration would be zero. The value stays. One more evaluation, where there are such samples or none.

    Args:
        solution: of a solve to a tolerance, recorded.
        f: the map.
        z0: starting point, (B, D).
    """
    still = (solution.value.detach() == z0.detach()).all(1)
    if still.numel() and not bool(still.any()):
        return solution
    image = f(z0)
    still = (still & image.detach().isfinite().all(1)).unsqueeze(1)
    value = torch.where(still, solution.value.detach() + (image - image.detach()), solution.value)
    return replace(solution, value=value, nfe=solution.nfe + 1)


def first_order_only(value: Tensor) -> Tensor:
    """`value`, with its gradient, refusing to be differentiated twice."""
    return _passing(value, value.detach()) if value.requires_grad or is_transformed() else value


def with_gradient(
    value: Tensor, rule: GradientRule, saved: Sequence[Tensor] = (), others: Sequence[Tensor] = ()
) -> Tensor:
    """`value` with a backward pass of its own; its inputs are `saved` and `others`, in this order.

    Args:
        value: (B, D), whatever it was computed from.
        rule: `rule(g, wanted, *saved)` gives the gradients of the first inputs; see `GradientRule`. It must
            call `refuse_second_order` unless what it does can itself be differentiated.
        saved: inputs that the rule needs. `value` among them stands for the result, so that what the rule
            makes of it can be differentiated once more.
        others: further inputs.
    """
    return _apply(_WithGradient, rule, len(saved), value, *saved, *others)


def refuse_second_order() -> None:
    """Raise `RuntimeError` inside a backward pass that is itself being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(_TWICE)


def _refuse_transforms() -> None:
    if is_transformed():
        raise RuntimeError(
            "this backward mode does not work under torch.func transforms and forward-mode differentiation; "
            'use backward=ImplicitDifferentiation(), JFB() or PhantomGradient(form="unroll")'
        )


def _of_compiled_autograd(rule: GradientRule, g: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """What `_WithGradient.backward` finds where compiled autograd calls it, with a context of its own.

    That has taken apart the graph behind what is saved, so only a start of the tape works there. No gradient
    that is wanted may be left out: it is zero, and of what has the shape of the state.
    """
    if rule is not _no_gradient:
        raise RuntimeError(
            "compiled autograd (torch._dynamo.config.compiled_autograd) takes the graph of the cell apart "
            "before this backward mode uses it; call backward() without it, or use "
            "backward=ImplicitDifferentiation(), JFB() or Unroll()"
        )
    return [torch.zeros_like(g) if want else None for want in wanted]


def _no_gradient(*_: Any) -> list[Tensor | None]:
    return []


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]  # as torch declares it
    return output


class _WithGradient(torch.autograd.Function):
    """`value` in the forward pass; in the backward pass what `rule` makes of its gradient."""

    @staticmethod
    def forward(ctx: Any, rule: GradientRule, num_saved: int, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.rule, ctx.starts_tape = rule, rule is _no_gradient
        result = value.detach()
        ctx.save_for_backward(*(result if tensor is value else tensor for tensor in inputs[:num_saved]))
        return result

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        refuse_batched_gradients(g)
        # Taken once: under activation checkpointing a second time is an error.
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        is_taken_apart = not isinstance(ctx, BackwardCFunction)
        if is_taken_apart:
            return None, None, None, *_of_compiled_autograd(ctx.rule, g, wanted)
        found = ctx.rule(g, wanted, *saved)
        return None, None, None, *found, *(None for _ in wanted[len(found) :])


def _passing(output: Tensor, value: Tensor, order: int = 1) -> Tensor:
    """`value`, whose gradient goes to `output`, and which can be differentiated `order` times, 0 or 1."""
    return _apply(_PassingForward if is_transformed() else _Passing, output, value, order)


class _Passing(torch.autograd.Function):
    """`value` in the forward pass; its gradient goes to `output`, and has one order less."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, value: Tensor, order: int) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], result: Tensor) -> None:
        ctx.order = inputs[2]
        if ctx.order:
            ctx.save_for_backward(result)
            if is_forward_mode_active():  # else it would be a circle of references, for nothing
                ctx.save_for_forward(result)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        _refuse_used_up(ctx.order)
        refuse_batched_gradients(g)
        # `result` leads to everything that a second derivative could be asked for.
        (result,) = ctx.saved_tensors
        return _passing(result, g, ctx.order - 1) if torch.is_grad_enabled() else g, None, None


class _PassingForward(_Passing):
    """With forward mode: a class of its own, as the compiler accepts no function that has it."""

    @staticmethod
    @uncompiled
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_used_up(ctx.order)
        if tangents[0] is None:
            return None
        with forward_mode(True):  # so that an outer level is refused
            return _passing(primal(ctx.saved_tensors[0]), tangents[0], ctx.order - 1)


def _refuse_used_up(order: int) -> None:
    """Raise where what can be differentiated no more is to be differentiated."""
    if order == 0:
        raise RuntimeError(_TWICE)


_TWICE = (
    "this backward mode cannot be differentiated twice: its gradient holds the fixed point constant, so "
    "second derivatives would be wrong; use backward=ImplicitDifferentiation() or backward=Unroll()"
)

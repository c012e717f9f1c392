"""The contract of a backward mode, and the pieces modes are made of.

A mode wraps the whole solve: it decides what runs on autograd's tape. Modes that solve off the tape
follow one pattern: solve under `no_grad`, evaluate the map once more on the tape at the fixed point, and
return the fixed point with that evaluation's graph attached. The value is therefore the same in every
mode, with and without gradients, and the residual that the solution reports is that of its value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..solution import Solution
from ..solvers import Solver
from ..state import Map
from ..stopping import Stopping
from .capture import forward_mode, is_transformed, primal
from .functional import solve_constant

VectorJacobianProduct = Callable[[Tensor], Tensor]  # u -> J^T u, both (B, D)
Adjoint = Callable[..., Tensor]  # (g, vjp, *kept) -> u, with g and u (B, D)


class Solve(Protocol):
    """The driver with the caller's solver, stopping rule and failure policy filled in."""

    def __call__(
        self,
        f: Map,
        z0: Tensor,
        *,
        solver: Solver | None = None,
        stopping: Stopping | None = None,
        what: str = ...,
    ) -> Solution:
        """Solve and report failure; `None` means the caller's setting, `what` names the solve."""


class Backward(ABC):
    """How gradients pass through a solve. Subclasses are frozen, keyword-only dataclasses."""

    def check(self, solver: Solver, stopping: Stopping) -> None:  # noqa: B027  # any settings will do
        """Raise `ValueError` unless the mode works with these settings of the forward solve."""

    @property
    def is_traceable(self) -> bool:
        """Whether `torch.compile` can look into a recorded solve of a fixed number of steps."""
        return False

    @abstractmethod
    def apply(self, f: Map, z0: Tensor, solve: Solve) -> Solution:
        """Solve for the fixed point of `f` from `z0` (B, D) and attach the gradient to its value."""


def solve_off_tape(f: Map, z0: Tensor, solve: Solve, *, stopping: Stopping | None = None) -> Solution:
    """The solve under `no_grad`, leaving no trace for the evaluations on the tape that follow."""
    if is_transformed():
        return solve_constant(f, z0, lambda f, z0: solve(f, z0, stopping=stopping))
    with torch.no_grad():
        solution = solve(f, z0.detach(), stopping=stopping)
    # Autocast caches the weights it casts. Where PyTorch casts them under no_grad without a graph, using
    # them again on the tape cuts the weights' gradient (https://github.com/pytorch/pytorch/issues/48049).
    if torch.is_grad_enabled() and torch.is_autocast_enabled(z0.device.type):
        torch.clear_autocast_cache()
    # So does `parametrize.cached` with the weights it computes.
    if torch.is_grad_enabled() and parametrize._cache_enabled:
        parametrize._cache.clear()
    return solution


def attach(
    solution: Solution,
    output: Tensor,
    adjoint: Adjoint,
    source: Tensor | None,
    nfe: int,
    kept: Sequence[Tensor] = (),
) -> Solution:
    """`solution` whose value sends `adjoint(g, vjp, *kept)` into the graph of `output` when g arrives.

    Args:
        solution: found off the tape.
        output: (B, D), evaluated on the tape at the fixed point.
        adjoint: turns the gradient of the value into that of `output`.
        source: the point `output` was evaluated at, see `on_tape`; `None` where `vjp` is not needed.
        nfe: evaluations spent on `output`.
        kept: what else the adjoint needs. Autograd keeps it: it goes with the graph, is seen by hooks on
            saved tensors, and activation checkpointing computes it again.
    """
    solution = replace(solution, nfe=solution.nfe + nfe)
    if source is None and adjoint is identity_adjoint:
        if not (output.requires_grad or is_transformed()):
            return solution
        return replace(solution, value=_pass(output, solution.value))
    _refuse_transforms()
    if not (output.requires_grad if source is None else asks_for_gradient(output)):
        return solution
    return replace(solution, value=_apply(_Attach, output, source, solution.value, adjoint, *kept))


def on_tape(f: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    """One evaluation on the tape: a point that records J and at which the graph ends, and the image."""
    source = start_of_tape(z)
    return source, f(source)


def start_of_tape(z: Tensor) -> Tensor:
    """`z` as a point that records J and at which the graph ends.

    Raises:
        RuntimeError: under a transform of `torch.func`, whose graphs cannot be kept.
    """
    _refuse_transforms()
    return _apply(_GraphEnd, z.detach().requires_grad_())


def _refuse_transforms() -> None:
    if is_transformed():
        raise RuntimeError(
            "this backward mode does not work under torch.func transforms and forward-mode differentiation; "
            'use backward=ImplicitDifferentiation(), JFB() or PhantomGradient(form="unroll")'
        )


def product(u: Tensor, output: Tensor, source: Tensor) -> Tensor:
    """J^T u, from the graph between the two; may be called again."""
    with torch.enable_grad():
        (found,) = torch.autograd.grad(output, source, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if found is None else found


def refuse_batched_gradients(g: Tensor) -> None:
    """Raise where a backward pass is run for many gradients by the predecessor of `torch.vmap`."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(g):
        raise RuntimeError(
            "the backward pass of a solve cannot be batched by is_grads_batched=True or vectorize=True; use "
            "torch.func.jacrev or torch.func.vmap with backward=ImplicitDifferentiation()"
        )


def asks_for_gradient(output: Tensor) -> bool:
    """Whether `output`, evaluated on the tape, depends on anything that requires gradient but its start."""
    if output.grad_fn is None:
        return output.requires_grad
    return any(True for _ in ends(output))


def ends(output: Tensor, known: Container[Any] = ()) -> Iterator[Any]:
    """The leaves that the graph of `output` leads to, without what lies behind `known` nodes.

    The points at which the graphs of this and of nested solves end are no leaves.
    """
    for node in _nodes([output.grad_fn], known):
        if not node.next_functions:  # the end of a branch: a leaf that accumulates its gradient
            yield node


def leads_to(tensors: Iterable[Tensor], source: Tensor) -> bool:
    """Whether any of `tensors` was made from `source`."""
    start = source.grad_fn
    return any(
        following is start
        for node in _nodes([tensor.grad_fn for tensor in tensors])
        for following, _ in node.next_functions
    )


def _nodes(pending: list[Any], known: Container[Any] = ()) -> Iterator[Any]:
    """All nodes of a graph from these on, without `known` ones, starts of the tape, and what lies behind."""
    seen: set[object] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen or node in known or isinstance(node, _GraphEnd._backward_cls):
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def first_order_only(value: Tensor) -> Tensor:
    """`value`, refusing to be differentiated twice."""
    return _pass(value, value.detach()) if value.requires_grad or is_transformed() else value


def _pass(output: Tensor, value: Tensor) -> Tensor:
    """`value`, sending what arrives to `output`; to first order."""
    return _apply(_PassedForward if is_transformed() else _Passed, output, value)


def identity_adjoint(g: Tensor, vjp: VectorJacobianProduct) -> Tensor:
    """u = g."""
    return g


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    output: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]  # as torch declares it
    return output


class _GraphEnd(torch.autograd.Function):
    """Identity that later products with J^T start from and that no gradient passes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


class _Passed(torch.autograd.Function):
    """`value` in the forward pass; what arrives goes on to `output`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_batched_gradients(grads[0])
        (result,) = ctx.saved_tensors
        # `result` leads to everything that a second derivative could be asked for.
        return (_apply(_Once, grads[0], result) if torch.is_grad_enabled() else grads[0]), None


class _PassedForward(_Passed):
    """With forward mode, which the compiler does not accept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _Passed.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if tangents[0] is None:
            return None
        with forward_mode():  # so that an outer level is refused
            return _apply(_Once, tangents[0], primal(ctx.saved_tensors[0]))


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated, whatever of `result` the derivative is taken of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, result: Tensor) -> Tensor:
        return g.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_TWICE)


class _Attach(torch.autograd.Function):
    """`value` in the forward pass, `adjoint` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, source: Tensor | None, value: Tensor, adjoint: Adjoint, *kept: Tensor
    ) -> Tensor:
        ctx.adjoint = adjoint
        if source is not None:
            ctx.save_for_backward(output, source, *kept)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_order()
        refuse_batched_gradients(grads[0])
        saved = ctx.saved_tensors  # once: under activation checkpointing a second unpacking is an error
        u = ctx.adjoint(grads[0], lambda u: product(u, *saved[:2]), *saved[2:])
        return u, *(None for _ in ctx.needs_input_grad[1:])


def refuse_second_order() -> None:
    """Raise inside a backward pass that is itself being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(_TWICE)


_TWICE = (
    "this backward mode cannot be differentiated twice: its gradient holds the fixed point constant, so "
    "second derivatives would be wrong; use backward=ImplicitDifferentiation() or backward=Unroll()"
)

"""The contract of a backward mode, and the pieces modes are made of.

A mode wraps the whole solve: it decides what runs on autograd's tape. Modes that solve off the tape
follow one pattern: solve under `no_grad`, evaluate the map once more on the tape at the fixed point, and
return the fixed point with that evaluation's graph attached. The value is therefore the same in every
mode, with and without gradients, and the residual that the solution reports is that of its value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..solution import Solution
from ..solvers import Solver
from ..state import Map
from ..stopping import Stopping

VectorJacobianProduct = Callable[[Tensor], Tensor]  # u -> J^T u, both (B, D)
Adjoint = Callable[[Tensor, VectorJacobianProduct], Tensor]  # (g, vjp) -> u, all (B, D)


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

    @abstractmethod
    def apply(self, f: Map, z0: Tensor, solve: Solve) -> Solution:
        """Solve for the fixed point of `f` from `z0` (B, D) and attach the gradient to its value."""


def solve_off_tape(f: Map, z0: Tensor, solve: Solve, *, stopping: Stopping | None = None) -> Solution:
    """The solve under `no_grad`, leaving no trace for the evaluations on the tape that follow."""
    with torch.no_grad():
        solution = solve(f, z0.detach(), stopping=stopping)
    # Autocast caches the weights it casts. Where PyTorch casts them under no_grad without a graph, using
    # them again on the tape cuts the weights' gradient (https://github.com/pytorch/pytorch/issues/48049).
    if torch.is_grad_enabled() and torch.is_autocast_enabled(z0.device.type):
        torch.clear_autocast_cache()
    return solution


def attach(solution: Solution, output: Tensor, adjoint: Adjoint, source: Tensor | None, nfe: int) -> Solution:
    """`solution` whose value sends `adjoint(g, vjp)` into the graph of `output` when g arrives.

    Args:
        solution: found off the tape.
        output: (B, D), evaluated on the tape at the fixed point.
        adjoint: turns the gradient of the value into that of `output`.
        source: the point `output` was evaluated at, see `on_tape`; `None` where `vjp` is not needed.
        nfe: evaluations spent on `output`.
    """
    nfe += solution.nfe
    if not _asks_for_gradient(output, source):
        return replace(solution, nfe=nfe)
    return replace(solution, value=_apply(_Attach, output, source, solution.value, adjoint), nfe=nfe)


def on_tape(f: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    """One evaluation on the tape: a point that records J and at which the graph ends, and the image."""
    source = _apply(_GraphEnd, z.detach().requires_grad_())
    return source, f(source)


def _asks_for_gradient(output: Tensor, source: Tensor | None) -> bool:
    """Whether `output` depends on anything that requires gradient, `source` excepted."""
    if source is None or output.grad_fn is None:
        return output.requires_grad
    seen: set[object] = {source.grad_fn}
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:  # the end of a branch: a leaf that accumulates its gradient
            return True
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return False


def first_order_only(value: Tensor) -> Tensor:
    """`value`, refusing to be differentiated twice."""
    return _apply(_FirstOrderOnly, value) if value.requires_grad else value


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


class _Attach(torch.autograd.Function):
    """`value` in the forward pass, `adjoint` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor | None, value: Tensor, adjoint: Adjoint) -> Tensor:
        ctx.adjoint = adjoint
        if source is not None:
            ctx.save_for_backward(output, source)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_order()
        saved = ctx.saved_tensors  # once: under activation checkpointing a second unpacking is an error

        def vjp(u: Tensor) -> Tensor:
            output, source = saved
            with torch.enable_grad():
                (product,) = torch.autograd.grad(output, source, u, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if product is None else product

        return ctx.adjoint(grads[0], vjp), None, None, None


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that refuses to be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_order()
        return grads[0]


def refuse_second_order() -> None:
    """Raise inside a backward pass that is itself being recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this backward mode cannot be differentiated twice (create_graph=True): its gradient holds the "
            "fixed point constant, so second derivatives would be wrong; use backward=Unroll()"
        )

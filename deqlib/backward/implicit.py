"""Implicit differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_instance
from ..solution import Solution
from ..solvers import Auto, Solver
from ..solvers.base import dot, norms
from ..state import Map
from ..stopping import Stopping
from .base import (
    Backward,
    Solve,
    asks_for_gradient,
    ends,
    leads_to,
    product,
    refuse_batched_gradients,
    solve_off_tape,
    start_of_tape,
)
from .capture import ExplicitMap, Watch, is_transformed, watched, watched_constant
from .functional import Adjoint, CellProblem, product_with_tensors, solve_explicitly


class AdjointStart:
    """Where an adjoint solve begins: at what the one before it found.

    For training loops in which the same samples come again in the same places (full batches, a fixed
    order) and change little in between. The part of g that points along the last g begins at the last
    adjoint, the rest at itself, so a start that does not fit costs nothing but two vectors of memory.
    Solves of another shape, type or device begin afresh. Only where they begin changes, not what they must
    reach: gradients stay within the adjoint's tolerance.

    The object is yours: it belongs to the layers you give it to, best one to each, and is what makes two
    backward passes depend on one another. Used in plain backward passes; not under `create_graph` and the
    transforms of `torch.func`.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None  # g and its adjoint, (B, D) each

    def guess(self, g: Tensor) -> Tensor:
        """A first adjoint for g (B, D)."""
        if self._last is None:
            return g
        then, u = self._last
        if (then.shape, then.dtype, then.device) != (g.shape, g.dtype, g.device):
            return g
        length = norms(then)[0]
        share = dot(then / length.unsqueeze(1), g) / length
        start = g + share.unsqueeze(1) * (u - then)
        return torch.where(start.isfinite().all(1, keepdim=True), start, g)

    def remember(self, g: Tensor, u: Tensor) -> None:
        """The adjoint found for g."""
        self._last = (g.detach(), u.detach())


@dataclass(frozen=True, kw_only=True)
class ImplicitDifferentiation(Backward):
    """The exact gradient, from the implicit function theorem.

    The gradient g of the fixed point is turned into u = J^T u + g, the adjoint, itself a fixed point: the
    driver solves it with any solver, starting from g, and its failures fall under the same policy as the
    forward solve's. Then one vector-Jacobian product gives the gradient of everything f depends on.
    (Bai et al. 2019, arXiv 1909.01377, theorem 1.)

    No bias: the error is that of the two solves. Memory: one evaluation and the adjoint solver's history.
    Cost: one evaluation, and one vector-Jacobian product an adjoint step.

    Derivatives of every order, forward mode (t = J t + b, a fixed point too) and all transforms of
    `torch.func` work; each is found by solves of the same settings. There the cell is evaluated anew, once
    forward and once a derivative, which needs what the cell does to go through PyTorch functions in Python,
    in the thread of the solve, with the same tensors whatever the state. `compact` has no effect there.

    Args:
        solver: of the adjoint, and of the tangent in forward mode.
        stopping: of these; its tolerance bounds the relative error of the gradient.
        warm_start: an `AdjointStart` to begin an adjoint solve from the one before.
    """

    solver: Solver = field(default_factory=Auto)
    stopping: Stopping = field(default_factory=lambda: Stopping(rtol=1e-4))
    warm_start: AdjointStart | None = None

    def __post_init__(self) -> None:
        """Validate."""
        hint = "a deqlib solver such as Anderson(memory=5)"
        check_instance("ImplicitDifferentiation", Solver, hint, solver=self.solver)
        check_instance(
            "ImplicitDifferentiation",
            Stopping,
            "a deqlib.Stopping such as Stopping(rtol=1e-4)",
            stopping=self.stopping,
        )
        if self.warm_start is not None:
            hint = "a deqlib.AdjointStart() or None"
            check_instance("ImplicitDifferentiation", AdjointStart, hint, warm_start=self.warm_start)

    def apply(self, f: Map, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, evaluate once on it, solve the adjoint in the backward pass."""
        if is_transformed():
            problem = self._problem(f, watched_constant(f, z0), solve)
            solution = solve_explicitly(problem, z0, problem.tensors)
            return replace(solution, nfe=solution.nfe + 1)
        solution = solve_off_tape(f, z0, solve)
        if not torch.is_grad_enabled():
            return solution
        source = start_of_tape(solution.value)
        output, watch = watched(f, source)
        solution = replace(solution, nfe=solution.nfe + 1)
        if not asks_for_gradient(output):
            return solution

        problem = self._problem(f, watch, solve)
        start = self.warm_start
        value = _Implicit.apply(start, problem, output, source, solution.value, *problem.tensors)  # type: ignore[no-untyped-call]
        return replace(solution, value=value)

    def _problem(self, f: Map, watch: Watch, solve: Solve) -> CellProblem:
        def linear(f: Map, z0: Tensor, what: str) -> Solution:
            return solve(f, z0, solver=self.solver, stopping=self.stopping, what=what)

        return CellProblem(ExplicitMap.of(f, watch), solve, linear)


class _Implicit(torch.autograd.Function):
    """`value` in the forward pass; in the backward pass the adjoint, by the cheapest way that is right."""

    @staticmethod
    def forward(
        ctx: Any,
        start: AdjointStart | None,
        problem: CellProblem,
        output: Tensor,
        source: Tensor,
        value: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.start, ctx.problem = start, problem
        result = value.detach()
        ctx.save_for_backward(output, source, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        refuse_batched_gradients(g)
        problem = ctx.problem
        output, source, z = ctx.saved_tensors  # once: under activation checkpointing twice is an error
        if not (torch.is_grad_enabled() or is_transformed()):
            # One backward pass: the graph of the evaluation on the tape serves all products, and takes u
            # to whatever the cell depends on.
            u = ctx.start.guess(g) if ctx.start else g
            u = problem.linear(lambda u: product(u, output, source) + g, u, "adjoint solve").value
            if ctx.start:
                ctx.start.remember(g, u)
            return None, None, u, None, None, *(None for _ in problem.tensors)
        # The result is to be differentiated, or there are many g: everything explicit.
        _check_all_seen(output, source, problem.tensors)
        tensors, wanted = problem.tensors, ctx.needs_input_grad[5:]
        u = solve_explicitly(Adjoint(problem), g, [g, z, *tensors]).value
        return (None,) * 5 + tuple(product_with_tensors(problem, u, z, tensors, wanted))


def _check_all_seen(output: Tensor, source: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise unless `tensors` are all that `output` depends on, `source` excepted, and not made from it."""
    known = {
        torch.autograd.graph.get_gradient_edge(tensor).node for tensor in tensors if tensor.requires_grad
    }
    unseen = [tuple(getattr(node, "variable", output).shape) for node in ends(output, known)]
    if unseen or leads_to(tensors, source):
        raise RuntimeError(
            "ImplicitDifferentiation: derivatives of second order need to see what the cell does, but part "
            f"of it is out of sight (leaves unseen, by shape: {unseen}): operations in other threads, or "
            "outside of PyTorch; call these from the thread of the solve or use backward=Unroll()"
        )

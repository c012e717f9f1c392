"""Implicit differentiation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import check_instance
from .._torch import is_transformed
from ..solution import Solution
from ..solvers import Auto, Solver
from ..solvers.base import dot, norms
from ..state import FlatMap, Map
from ..stopping import Stopping
from .base import Backward, Solve
from .capture import ExplicitMap, Watch, watched_constant
from .explicit import CellEquation, solve_explicitly
from .graph import depends_on_leaves
from .recorded import Recorded, implicit
from .tape import on_tape, solve_off_tape, solve_unconfirmed


class AdjointStart:
    """Where an adjoint solve begins: at what the one before it found.

    For training loops in which the same samples come again in the same places (full batches, a fixed
    order) and change little in between. The part of g that points along the last g begins at the last
    adjoint, the rest at itself, so a start that does not fit costs nothing but two vectors of memory.
    Solves of another shape, type or device begin afresh. Only where they begin changes, not what they must
    reach: gradients stay within the adjoint's tolerance.

    The object is yours: it belongs to the layers you give it to, best one to each, and is what makes two
    backward passes depend on one another. Used in plain backward passes; not under `create_graph` and the
    transforms of `torch.func`. A copy, or one read from a pickle, begins afresh.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None  # g and its adjoint, (B, D) each

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last solve found: a saved model is no larger for having been trained."""
        return {**self.__dict__, "_last": None}

    def guess(self, g: Tensor) -> Tensor:
        """Where to begin.

        Args:
            g: gradient of the fixed point, (B, D).

        Returns:
            A first adjoint for it, (B, D).
        """
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
        """Keep what was found, for the next `guess`.

        Args:
            g: gradient of the fixed point, (B, D).
            u: its adjoint, (B, D).
        """
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
    `torch.func` work; each is found by solves of the same settings. With `create_graph=True` they come from
    the graph of the one evaluation. Under transforms and in forward mode the cell is evaluated anew, once
    forward and once a derivative, with tensors put in the place of those that it uses: inputs, captured
    tensors, parameters of modules that it is or refers to. Others are found where they go through PyTorch
    functions in Python, in the thread of the solve. `compact` has no effect there.

    Args:
        solver: of the adjoint, and of the tangent in forward mode; default `Auto()`.
        stopping: of these; its tolerance bounds the relative error of the gradient. Default
            `Stopping(rtol=1e-4)`.
        warm_start: an `AdjointStart` to begin an adjoint solve from the one before; default `None`, from g.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, or a rule for states alone.
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
        if self.stopping.readout is not None or self.stopping.hold_places:
            raise ValueError(
                "ImplicitDifferentiation: stopping is the rule of the adjoint, which is no state to be read "
                f"and has no places to hold, got {self.stopping}; give readout and hold_places to the rule "
                "of the layer"
            )
        if self.warm_start is not None:
            hint = "a deqlib.AdjointStart() or None"
            check_instance("ImplicitDifferentiation", AdjointStart, hint, warm_start=self.warm_start)

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, evaluate once on it, solve the adjoint in the backward pass."""
        if is_transformed():
            equation = self._equation(f, watched_constant(f, z0), solve)
            solution = solve_explicitly(equation, z0, equation.map.tensors)
            return replace(solution, nfe=solution.nfe + 1)
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        source, output = on_tape(f, solution.value)
        solution = confirm(output)
        solution = replace(solution, nfe=solution.nfe + 1)
        if not depends_on_leaves(output):
            return solution
        how = Recorded(
            partial(self._adjoint, solve, self.warm_start),
            partial(self._adjoint, solve, None),
            partial(on_tape, f),
        )
        return replace(solution, value=implicit(how, solution.value, output, source))

    def _adjoint(self, solve: Solve, start: AdjointStart | None, f: Map, g: Tensor) -> Tensor:
        """The solution of u = f(u), f(u) = J^T u + g."""
        first = start.guess(g) if start else g
        u: Tensor = solve.linear(f, first, solver=self.solver, stopping=self.stopping).value
        if start:
            start.remember(g, u)
        return u

    def _equation(self, f: FlatMap, watch: Watch, solve: Solve) -> CellEquation:
        def linear_solve(f: Map, start: Tensor, name: str) -> Solution:
            return solve.linear(f, start, solver=self.solver, stopping=self.stopping, name=name)

        return CellEquation(solve, linear_solve, ExplicitMap.of(f, watch))

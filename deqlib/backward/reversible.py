"""Differentiation through the solver's steps, run backwards."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from .._checks import check_choice, check_number, settle_numbers
from ..solution import OnFailure, Solution, Status, levels_to_caller
from ..solvers import Solver
from ..solvers.base import norms
from ..solvers.reversible import Points, ReversiblePicard, ReversibleState, choose, same
from ..state import FlatMap
from ..stopping import Stopping
from .base import Backward, Solve
from .capture import ExplicitMap, watched
from .graph import leaves_of, makers, nodes
from .tape import (
    refuse_second_order,
    solve_off_tape,
    solve_unconfirmed,
    start_of_tape,
    with_first_step,
    with_gradient,
)

_RANGE = 2  # a rebuilt point that is longer than the forward pass's longest by this factor is a wrong one


class ReconstructionWarning(UserWarning):
    """Iterates that the backward pass rebuilt do not lead back to the starting point."""


class ReconstructionError(RuntimeError):
    """As `ReconstructionWarning`, where the caller asked for an error."""


@dataclass(frozen=True, kw_only=True)
class Reversible(Backward):
    """The gradient of the iteration, as `Unroll` has it, in memory that does not grow with its steps.

    Needs a solver whose steps can be undone, `solver=ReversiblePicard(...)`. The backward pass starts from
    the last two points and rebuilds one after the other, w_{n-1} = (w_{n+1} - b f(w_n)) / (1 - b),
    sending the gradient through each evaluation on the way. It reaches arguments, parameters, closures and
    the starting point. A sample takes part from the step of its own value on.
    (McCallum, Arora & Foster 2025, arXiv 2509.12917.)

    Memory: two states in float64 and the starting point, and during the backward pass one evaluation.
    Cost: one evaluation to find the tensors that the cell uses; in the backward pass one evaluation and
    one vector-Jacobian product a step. First order only.

    Every step undone multiplies rounding errors, by up to s / (1 - b) where the iteration converges at the
    rate s. The states are kept in float64 for this; the cell works in its own type. A sample whose rebuilt
    point is far larger than all that the forward pass saw is dropped there: its gradient is that of the
    steps done so far, truncated. At the end the starting point is known, and what was rebuilt is compared
    with it: that distance, relative to the largest point and at most 1 (as for samples dropped), times the
    share of the gradient that has come so far back, estimates the relative error of a sample's gradient.

    Figures for z = tanh(W z + x), W symmetric with eigenvalues in [-r, r], width 64, small x, one draw, the
    worse of float32 and float64: steps until the residual is 1e-3, error of the gradient there, and the
    most steps (every fifth up to 195 tried) whose estimate stays below 1e-3. Over three draws and r up to
    0.95 the error was at most 4.2 times the estimate, where it was above 1e-6.

    | r | b = 0.3 | b = 0.5 | b = 0.8 |
    | --- | --- | --- | --- |
    | 0.5 | 60, 1e-12, all | 31, 1e-13, all | 15, 1e-12, all |
    | 0.7 | 91, 1e-8, all | 48, 1e-8, 190 | 23, 2e-7, all |
    | 0.9 | 174, 2e-2, 100 | 92, 2e-2, 50 | 46, 4e-2, 20 |

    A larger damping is about as accurate in half the evaluations, hence the solver's default of 0.8.

    The cell must be a function: two evaluations at one point must agree to the last bit. Random dropout,
    tensors changed before the backward pass, and kernels that sum in a random order all show up as drift.
    `compact` may too: kernels may sum in another order for another batch.

    Args:
        rtol: largest estimate of the relative error of a sample's gradient that passes without a report,
            at least 0.
        on_drift: beyond it "raise" throws `ReconstructionError`, "warn" warns `ReconstructionWarning`,
            "ignore" does neither and saves a device synchronisation; of which there is one a step in any
            case, to see whether a sample is to be dropped.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    rtol: float = 1e-3
    on_drift: OnFailure = "warn"

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_number("Reversible", 0, rtol=self.rtol)
        check_choice("Reversible", get_args(OnFailure), on_drift=self.on_drift)

    def check(self, solver: Solver, stopping: Stopping) -> None:
        """Refuse solvers whose steps cannot be undone, and rules whose best iterate the solver cannot tell.

        Raises:
            ValueError: see above.
        """
        if not isinstance(solver, ReversiblePicard):
            raise ValueError(
                f"Reversible: needs a solver whose steps can be undone, got solver={solver}; "
                "pass solver=ReversiblePicard(), or another backward mode"
            )
        if stopping.norm_axes is not None and not stopping.is_fixed:
            raise ValueError(
                f"Reversible: works with one residual norm a sample, got norm_axes={stopping.norm_axes}; "
                "leave it out, or take a fixed number of steps"
            )
        if stopping.keeps_last and not stopping.is_fixed:
            raise ValueError(
                "Reversible: walks back from the best iterate, which the solver notes, not from the last, "
                f'got {stopping}; pass keep="best", or take a fixed number of steps'
            )

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, find what the cell uses, leave the rest to the backward pass."""
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        explicit, image = _explicit(f, solution.value)
        solution = confirm(image)
        end, counts = _end(solution)
        walk = _Walk(explicit, solution.state.damping, self)
        saved = [z0, end.previous, end.current, end.steps, end.largest, counts, *explicit.tensors]
        value = with_gradient(solution.value, walk.backward, saved)
        solution = replace(solution, value=value, nfe=solution.nfe + 1)
        return solution if solve.stopping.is_fixed else with_first_step(solution, f, z0)

    def report(self, error: Tensor) -> None:
        """Tell of samples whose gradient is too far off, as asked.

        Args:
            error: estimated relative error of each sample's gradient, (B,).

        Raises:
            ReconstructionError: one is larger than `rtol`, and `on_drift` is "raise".
        """
        if self.on_drift == "ignore":
            return
        failed = error > self.rtol
        if not bool(failed.any()):
            return
        message = (
            f"Reversible: in {int(failed.sum())} of {error.numel()} samples the rebuilt iteration misses its "
            f"starting point; the error of the gradient may be {float(error[failed].max()):.1e} of it "
            f"(allowed: rtol={self.rtol:.1e}). What to try: fewer steps or a larger tolerance, a more "
            "contractive cell, a cell without randomness, or backward=Unroll(checkpoint=True)."
        )
        if self.on_drift == "raise":
            raise ReconstructionError(message)
        warnings.warn(message, ReconstructionWarning, stacklevel=levels_to_caller())


def _explicit(f: FlatMap, z: Tensor) -> tuple[ExplicitMap, Tensor]:
    """The map with what it depends on at `z`, found by one evaluation, and its image there, (B, D)."""
    source = start_of_tape(z)
    image, watch = watched(f, source)
    if image.requires_grad:
        # A leaf that was given to a custom function only is not seen by the watch, but the graph has it.
        ends = leaves_of(image, makers(watch.found.values()))
        watch.found |= {id(node.variable): node.variable for node in ends if hasattr(node, "variable")}
    return ExplicitMap.of(f, watch), image


def _end(solution: Solution) -> tuple[Points, Tensor]:
    """The points to walk back from, and at which step the value of each sample was reached, (B,)."""
    state: ReversibleState = solution.state
    # Where these are done the value is that of the last step counted, and the solver may have gone on.
    met = (Status.CONVERGED, Status.COUPLED, Status.COMPLETED, Status.EXITED)
    at_last = torch.stack([solution.status == status for status in met]).any(0)
    # Elsewhere it is the best iterate: one the solver noted, or the last one, which it was not told of.
    is_best = ~at_last & same(solution.value, state.best.current.to(solution.value.dtype))
    points = choose(is_best, state.best, state.latest)
    return points, torch.where(at_last, solution.num_steps, points.steps)


@dataclass(frozen=True, eq=False)
class _Walk:
    """What the backward pass needs besides saved tensors."""

    f: ExplicitMap
    damping: float
    mode: Reversible

    def backward(self, g: Tensor, _: Sequence[bool], z0: Tensor, *saved: Tensor) -> Sequence[Tensor | None]:
        """Gradients of what was saved: of the starting point and of the tensors. See `tape.GradientRule`."""
        refuse_second_order()
        end, counts, tensors = Points(*saved[:4]), saved[4], saved[5:]
        start, others = self.run(g, z0, end, counts, tensors)
        return start, *(None,) * 5, *others

    def run(
        self,
        g: Tensor,  # (B, D), gradient of the value
        z0: Tensor,  # (B, D)
        end: Points,
        counts: Tensor,  # (B,), step of the value: from there on a sample's gradient flows
        values: Sequence[Tensor],  # of what f depends on
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the starting point and of the tensors."""
        b = self.damping
        current, previous, steps = end.current, end.previous, end.steps
        upper, lower = g.to(current.dtype), torch.zeros_like(current)  # gradients of the two points
        evaluation = _Evaluation(self, [value.detach().requires_grad_() for value in values], g.dtype)
        for step in range(int(steps.max()) if steps.numel() else 0, 0, -1):
            image = evaluation.at(previous)
            rebuilt = (current - b * image) / (1 - b)
            size = norms(rebuilt)[0]
            lost = (step <= steps) & ~((size <= _RANGE * end.largest) & (size < torch.inf))
            if bool(lost.any()):
                steps, counts = steps.masked_fill(lost, -1), counts.masked_fill(lost, -1)
                if not bool((steps > 0).any()):
                    break
                # Zero times a number that is not finite is NaN, so a gradient of zero is not enough to keep a
                # lost sample out of the sums: it moves to the starting point, where the cell is finite.
                previous = torch.where(lost.unsqueeze(1), z0, previous)
                image = evaluation.at(previous)
                rebuilt = (current - b * image) / (1 - b)
            flows, moves = ((step <= count).unsqueeze(1) for count in (counts, steps))
            pulled = evaluation.pull(torch.where(flows, b * upper, 0))
            upper, lower = (
                torch.where(flows, lower + pulled, upper),
                torch.where(flows, (1 - b) * upper, lower),
            )
            current, previous = (
                torch.where(moves, previous, current),
                torch.where(moves, rebuilt, previous),
            )
        arrived = steps >= 0
        distance = norms(torch.cat([current - z0, previous - z0], 1))[0]
        drift = torch.where(distance == 0, 0, distance / end.largest)
        drift = torch.where(arrived, drift.clamp_max(1), 1)
        self.mode.report(drift * norms(torch.cat([upper, lower], 1))[0] / norms(g)[0])
        return torch.where(arrived.unsqueeze(1), upper + lower, 0).to(z0.dtype), evaluation.totals()


class _Evaluation:
    """Evaluations of the map on the tape, one at a time, and the sum of what they send to its tensors."""

    def __init__(self, walk: _Walk, leaves: list[Tensor], dtype: torch.dtype) -> None:
        self.walk, self.leaves, self.dtype = walk, leaves, dtype
        # The map's tensors are replaced by leaves, so that no gradient runs on into what they were made
        # from. Custom functions (`Function.apply`) are not told of it: parameters can be given to them.
        self.direct = [(i, t) for i, t in enumerate(walk.f.tensors) if t.grad_fn is None]
        self.sums: list[Tensor | None] = [None] * len(leaves)
        self.checked = False

    def at(self, point: Tensor) -> Tensor:
        """The image of a point, both (B, D) in the type of the iterates."""
        self.point = point.to(self.dtype).detach().requires_grad_()
        with torch.enable_grad():
            self.image = self.walk.f(self.point, *self.leaves)
        if not self.checked:
            _check_cut(self.image, self.walk.f.tensors)
            self.checked = True
        return self.image.detach().to(point.dtype)

    def pull(self, u: Tensor) -> Tensor:
        """J^T u at the last point, (B, D); adds u^T df/dtensor to the sums."""
        if not self.image.requires_grad:
            return torch.zeros_like(u)
        wanted = [self.point, *self.leaves, *(tensor for _, tensor in self.direct)]
        found = torch.autograd.grad(self.image, wanted, u.to(self.image.dtype), allow_unused=True)
        places = [*range(len(self.leaves)), *(i for i, _ in self.direct)]
        for place, gradient in zip(places, found[1:], strict=True):
            if gradient is not None:
                # In at least single precision: a sum of many.
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                total = self.sums[place]
                self.sums[place] = gradient if total is None else total + gradient
        return torch.zeros_like(u) if found[0] is None else found[0].to(u.dtype)

    def totals(self) -> list[Tensor | None]:
        """The sums, each in the type of its tensor."""
        pairs = zip(self.sums, self.leaves, strict=True)
        return [None if total is None else total.to(leaf.dtype) for total, leaf in pairs]


def _check_cut(image: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise if the graph of an evaluation runs on into what its tensors were made from."""
    outside = makers(tensors)
    if outside and any(node in outside for node in nodes([image])):
        raise RuntimeError(
            "Reversible: the cell passes a tensor that has a history to a custom autograd function "
            "(Function.apply), which hides it from the backward pass; pass x.clone() instead of x"
        )

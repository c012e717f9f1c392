"""The knob: how many iterations the implicit block gets at each scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from deqlib import JFB, Picard, Solution, Solver, Stopping, fixed_point

from ..kinds import check_kind

# Made once: a scale of a small model takes milliseconds. Nothing is recorded, so the mode has no say.
_PICARD, _NO_GRADIENT = Picard(), JFB()
MOST_ITERATIONS = 1_000_000  # a count above is a slip of the hand: a scale of it would take days


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Iterate at each scale until the relative residual is small.

    Args:
        rtol: relative residual to reach.
        max_steps: most solver steps a scale.
        solver: any solver of deqlib.
        per_sample: stop each sample by its own residual, so that it does not depend on the others.
            Otherwise a scale stops as a whole, by the residual over all samples computed together.
    """

    rtol: float = 1e-2
    max_steps: int = 20
    solver: Solver = field(default_factory=Picard)
    per_sample: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"Adaptive: solver must be a deqlib solver such as Picard(), got {self.solver!r} "
                f"({type(self.solver).__name__})"
            )
        check_kind("Adaptive: per_sample must be", self.per_sample, bool)
        self.stopping  # noqa: B018  # validates rtol and max_steps

    @property
    def stopping(self) -> Stopping:
        """The rule the driver follows."""
        return Stopping(rtol=self.rtol, max_steps=self.max_steps)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """So many evaluations of the cell in all, spread over the scales.

    Counts fall linearly from the first scale to the last, where most of the tokens are; each scale gets at
    least one, and together they are exactly the budget.

    Args:
        evaluations: sum of the counts of all scales.
        ratio: count of the first scale to that of the last, as near as whole numbers allow; 1 spreads
            evenly. The default is that of the fastest setting of the VIAR paper, 10 to 2.
    """

    evaluations: int
    ratio: float = 5.0

    def __post_init__(self) -> None:
        """Validate."""
        if type(self.evaluations) is not int or self.evaluations < 1:
            raise ValueError(
                f"Budget: evaluations must be an integer of at least 1, got {self.evaluations!r}"
            )
        if self.evaluations > MOST_ITERATIONS:
            raise ValueError(f"Budget: evaluations must be at most {MOST_ITERATIONS}, got {self.evaluations}")
        check_kind("Budget: ratio must be", self.ratio, float)
        if not 1 <= self.ratio < float("inf"):
            raise ValueError(f"Budget: ratio must be a number of at least 1, got {self.ratio}")

    def counts(self, num_scales: int) -> list[int]:
        """One count a scale, never rising.

        Args:
            num_scales: K, at least 1.

        Raises:
            ValueError: fewer evaluations than scales.
        """
        if self.evaluations < num_scales:
            raise ValueError(
                f"Budget: {num_scales} scales need at least one evaluation each, got {self.evaluations}"
            )
        spans = max(num_scales - 1, 1)
        shares = [self.ratio + (1 - self.ratio) * k / spans for k in range(num_scales)]
        exact = [max(1.0, self.evaluations * share / sum(shares)) for share in shares]
        # Where the last scales are lifted to one, the others pay in proportion to what they have above one.
        above = sum(exact) - num_scales
        if above > 0:
            keep = (self.evaluations - num_scales) / above
            exact = [1 + (value - 1) * keep for value in exact]
        counts = [int(value + 1e-9) for value in exact]
        by_remainder = sorted(range(num_scales), key=lambda k: (counts[k] - exact[k], k))
        for k in by_remainder[: self.evaluations - sum(counts)]:
            counts[k] += 1
        return sorted(counts, reverse=True)  # equal remainders may be rounded apart


Iterations = int | tuple[int, int] | Sequence[int] | Adaptive | Budget


def checked_iterations(iterations: Iterations) -> Iterations:
    """`iterations`, if they may be those of some model; a list is copied.

    Args:
        iterations: see `iteration_schedule`.

    Raises:
        TypeError, ValueError: no model could use them.
    """
    if isinstance(iterations, Adaptive | Budget):
        return iterations
    counts = [iterations] if type(iterations) is int else iterations
    if not (isinstance(counts, tuple | list) and all(type(n) is int for n in counts)):
        raise TypeError(
            "iterations: expected an int, a tuple (first, last), a list with one int a scale, "
            f"viar.Adaptive(...) or viar.Budget(...), got {iterations!r}"
        )
    if not counts:
        raise ValueError("iterations: expected one count a scale or a tuple (first, last), got 0 counts")
    if min(counts) < 1:
        raise ValueError(f"iterations: every scale needs at least 1 iteration, got {iterations!r}")
    if max(counts) > MOST_ITERATIONS:
        raise ValueError(f"iterations: expected at most {MOST_ITERATIONS} a scale, got {iterations!r}")
    return list(iterations) if isinstance(iterations, list) else iterations


def iteration_schedule(iterations: Iterations, num_scales: int) -> list[int] | list[Adaptive]:
    """`iterations` spelled out, one entry a scale.

    Args:
        iterations: an int, for all scales; a tuple (first, last), linear over the scales and truncated to
            int; a list with one int a scale; `Adaptive`; or `Budget`.
        num_scales: K.

    Raises:
        TypeError, ValueError: anything else, a list of another length, a count below 1.
    """
    check_kind("num_scales: expected", num_scales, int)
    if num_scales < 1:
        raise ValueError(f"num_scales: expected at least 1, got {num_scales}")
    checked = checked_iterations(iterations)
    if isinstance(checked, Adaptive):
        return [checked] * num_scales
    if isinstance(checked, Budget):
        return checked.counts(num_scales)
    if isinstance(checked, int):
        return [checked] * num_scales
    if isinstance(checked, tuple) and len(checked) == 2:
        first, last = checked
        spans = max(num_scales - 1, 1)
        return [(first * spans + (last - first) * k) // spans for k in range(num_scales)]
    if len(checked) != num_scales:
        raise ValueError(
            f"iterations: expected one count a scale ({num_scales}), one for all scales or a tuple (first, "
            f"last), got {len(checked)} counts: {checked}"
        )
    return list(checked)


def solve(
    f: Callable[[Tensor], Tensor], z0_BLC: Tensor, iterations: int | Adaptive, *, measure: bool = False
) -> Solution:
    """z = f(z) from z0, by so many steps of the plain iteration or as `Adaptive` says; for inference.

    Args:
        f: (B, L, C) -> (B, L, C).
        z0_BLC: where to start.
        iterations: steps, at least 0, or the rule to stop by.
        measure: with a number of steps: measure the residual at the end, at the cost of one more evaluation.

    Returns:
        `deqlib.Solution` with value (B, L, C) and evaluations (B,). Where a scale stops as a whole, all else
        in it is of the whole.
    """
    if not isinstance(iterations, Adaptive):
        stopping = Stopping.steps(iterations, measure=measure)
        return fixed_point(f, z0_BLC, solver=_PICARD, backward=_NO_GRADIENT, stopping=stopping)
    settle = partial(
        fixed_point,
        solver=iterations.solver,
        backward=_NO_GRADIENT,
        stopping=iterations.stopping,
        on_failure="ignore",
    )
    if iterations.per_sample:
        return settle(f, z0_BLC)
    # One sample in the eyes of the solver.
    whole = settle(lambda z: f(z[0])[None], z0_BLC[None])
    return replace(whole, value=whole.value[0], sample_nfe=whole.sample_nfe.expand(len(z0_BLC)))

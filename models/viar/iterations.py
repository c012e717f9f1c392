"""The knob: how many iterations the implicit block gets at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deqlib import Picard, Solver, Stopping


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Iterate each sample of each scale until its relative residual is small.

    Args:
        rtol: relative residual to reach.
        max_steps: most solver steps a scale.
        solver: any solver of deqlib.
    """

    rtol: float = 1e-2
    max_steps: int = 20
    solver: Solver = field(default_factory=Picard)

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"Adaptive: solver must be a deqlib solver such as Picard(), got {self.solver!r} "
                f"({type(self.solver).__name__})"
            )
        self.stopping  # noqa: B018  # validates rtol and max_steps

    @property
    def stopping(self) -> Stopping:
        """The rule the driver follows."""
        return Stopping(rtol=self.rtol, max_steps=self.max_steps)


Iterations = int | tuple[int, int] | Sequence[int] | Adaptive


def iteration_schedule(iterations: Iterations, num_scales: int) -> list[int] | list[Adaptive]:
    """`iterations` spelled out, one entry a scale.

    Args:
        iterations: an int, for all scales; a tuple (first, last), linear over the scales and truncated to
            int; a list with one int a scale; or `Adaptive`.
        num_scales: K.

    Raises:
        TypeError, ValueError: anything else, a list of another length, a count below 1.
    """
    if isinstance(iterations, Adaptive):
        return [iterations] * num_scales
    if isinstance(iterations, int) and not isinstance(iterations, bool):
        counts = [iterations] * num_scales
    elif isinstance(iterations, tuple | list) and all(type(n) is int for n in iterations):
        if isinstance(iterations, tuple) and len(iterations) == 2:
            first, last = iterations
            spans = max(num_scales - 1, 1)
            counts = [(first * spans + (last - first) * k) // spans for k in range(num_scales)]
        elif len(iterations) == num_scales:
            counts = list(iterations)
        else:
            raise ValueError(
                f"iterations: expected one count a scale ({num_scales}) or a tuple (first, last), "
                f"got {len(iterations)} counts: {iterations}"
            )
    else:
        raise TypeError(
            "iterations: expected an int, a tuple (first, last), a list with one int a scale, "
            f"or viar.Adaptive(...), got {iterations!r}"
        )
    if min(counts) < 1:
        raise ValueError(f"iterations: every scale needs at least 1 iteration, got {iterations!r}")
    return counts

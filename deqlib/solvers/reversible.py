"""Picard iteration that can be run backwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._checks import check_number, settle_numbers
from ..state import small_dtype
from .base import Seen, Solver, anyone, is_recorded


@dataclass(frozen=True)
class Points:
    """Two successive points of the iteration, from which all before them can be rebuilt."""

    previous: Tensor  # (B, D), float64 where the device has it
    current: Tensor  # (B, D), likewise
    steps: Tensor  # (B,), int64, steps that led to `current`
    largest: Tensor  # (B,), norm of the largest point up to `current`


@dataclass(frozen=True)
class ReversibleState:
    """Where the iteration is, and where it was at the best iterate."""

    damping: float
    latest: Points
    best: Points  # off the tape; kept up to date in solves to a tolerance alone, see `observe`
    finished: Tensor | None = None  # (B,), bool, samples that do not move any more; None: no sample


@dataclass(frozen=True, kw_only=True)
class ReversiblePicard(Solver):
    """w_{n+1} = (1 - damping) w_{n-1} + damping f(w_n), from w_{-1} = w_0 = z0.

    Two Picard iterations that feed each other (y = w_{-1}, w_1, w_3, ... and z = w_0, w_2, ...), so that
    every step can be undone: w_{n-1} = (w_{n+1} - damping f(w_n)) / (1 - damping). What
    `deqlib.Reversible` needs; it works with every other backward mode too.
    (McCallum, Arora & Foster 2025, arXiv 2509.12917.)

    Converges where all roots s of s^2 = (1 - damping) + damping * lambda * s, lambda the eigenvalues of J,
    are below 1 in size, at the rate of the largest; so wherever |lambda| < 1. Slower than Picard: for
    |lambda| <= 0.9 about 0.93 a step with damping 0.8, 0.97 with 0.5, 0.98 with 0.3. The iterates are kept
    in float64 where the device has it, whatever the cell's type: 16 bytes a number, and as much again for
    the best iterate so far.

    Args:
        damping: in (0, 1), ends excluded: at 1 the previous point is forgotten.
    """

    damping: float = 0.8

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_number("ReversiblePicard", 0, 1, open_minimum=True, damping=self.damping)
        if self.damping == 1:
            raise ValueError(
                "ReversiblePicard: damping must be in (0, 1), got 1, with which no step can be undone; "
                "Picard() is the plain iteration"
            )

    def init(self, z0: Tensor) -> ReversibleState:
        """Both points at `z0`."""
        start = z0.to(small_dtype(z0))
        count = torch.zeros(z0.shape[0], dtype=torch.int64, device=z0.device)
        points = Points(start, start, count, _size(start))
        return ReversibleState(damping=self.damping, latest=points, best=_off_tape(points))

    def observe(self, seen: Seen, state: ReversibleState) -> ReversibleState:
        """The points at the best iterate are kept; finished samples stay where they are."""
        latest = _off_tape(state.latest)
        best = (
            latest
            if seen.all_improved and seen.finished is None
            else choose(seen.improved, latest, state.best)
        )
        return replace(state, best=best, finished=seen.finished)

    def step(self, z: Tensor, fz: Tensor, state: ReversibleState) -> tuple[Tensor, ReversibleState]:
        """One evaluation is one step."""
        latest = state.latest
        image = fz.to(latest.previous.dtype)
        following = (1 - self.damping) * latest.previous + self.damping * image
        points = Points(
            latest.current,
            following,
            latest.steps + 1,
            torch.maximum(latest.largest, _size(following)),
        )
        if state.finished is not None and anyone(state.finished):
            points = choose(~state.finished, points, latest)
        return points.current.to(z.dtype), replace(state, latest=points)


def same(
    a: Tensor,  # (B, D)
    b: Tensor,  # (B, D)
) -> Tensor:
    """Which samples are equal in every number, NaN equal to NaN, bool (B,)."""
    return ((a == b) | (a.isnan() & b.isnan())).all(1)


def choose(which: Tensor, new: Points, old: Points) -> Points:
    """`new` for the samples chosen by `which`, bool (B,), `old` for the others."""
    rows = which.unsqueeze(1)
    return Points(
        torch.where(rows, new.previous, old.previous),
        torch.where(rows, new.current, old.current),
        torch.where(which, new.steps, old.steps),
        torch.where(which, new.largest, old.largest),
    )


def _off_tape(points: Points) -> Points:
    """The same points, without the graph that made them."""
    if not is_recorded(points.previous, points.current):
        return points
    return replace(points, previous=points.previous.detach(), current=points.current.detach())


def _size(points: Tensor) -> Tensor:
    """Norm of each sample's point, (B,)."""
    size: Tensor = torch.linalg.vector_norm(points.detach(), dim=1)
    return size

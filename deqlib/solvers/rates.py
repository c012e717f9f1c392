"""How fast residuals fall, and what that says of the method at work: what `Auto` judges samples by.

All functions take what the driver measured, of the samples in question alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Seen

_SLOW = 0.08  # a method that brings log(residual) down by less than that an evaluation is slow
_NEAR = 0.01  # a method that left less than this share of the residual led towards a solution


def lowest(seen: Seen) -> Tensor:
    """Smallest residual so far, this evaluation included, (B,)."""
    return torch.fmin(seen.before, seen.residual)


def blown_up(seen: Seen) -> Tensor | None:
    """The samples whose residual is beyond the best by what `Stopping.blowup` allows, or is not finite.

    bool (B,); it says nothing of samples that had finished before. `None`: the host knows of none.
    """
    return None if seen.all_improved else ~(seen.residual <= seen.blowup * seen.before)


def plain_steps_left(
    seen: Seen,
    older: Tensor,  # (B,), the residual two evaluations ago
    old: Tensor,  # (B,), and the one after that
) -> Tensor:
    """Steps to the tolerance by the plain iteration, (B,); infinite where it does not get there."""
    first, second = old / older, seen.residual / old
    # Rates rise as the fast parts of the error die away, so half of the last rise is added. Where residuals
    # fall and rise by turns, two steps together say how fast they fall.
    rate = torch.maximum(second * (second / first).clamp_min(1).sqrt(), (first * second).sqrt()).log()
    steps = (seen.goal / seen.residual).log() / rate
    return torch.where(rate < 0, steps, torch.inf)  # NaN compares as false: no rate


def is_slow(
    seen: Seen,
    start: Tensor,  # (B,), smallest residual when the method began
    age: int,  # evaluations since then
) -> Tensor:
    """The samples, bool (B,), whose residual falls too slowly by this method.

    It falls by less than 8 % an evaluation while more than half of the evaluations that it took are still to
    go; or the tolerance is predicted not to be met within the steps that are left.
    """
    now = lowest(seen)
    gone, left = (start / now).log(), (now / seen.goal).log()
    has_more_to_go = 2 * left > gone
    is_late = left * age > gone * seen.steps_left
    return (gone < _SLOW * age) & has_more_to_go | is_late


def is_near(
    seen: Seen,
    start: Tensor,  # (B,), smallest residual when the method began
) -> Tensor:
    """The samples, bool (B,), that the method led towards a solution."""
    return lowest(seen) <= _NEAR * start


def fall(
    seen: Seen,
    start: Tensor,  # (B,), smallest residual when the method began
    age: Tensor,  # (B,), int64, evaluations since then
) -> Tensor:
    """How far the method brought log(residual) down an evaluation, (B,)."""
    return (start / lowest(seen)).log() / age.clamp_min(1)

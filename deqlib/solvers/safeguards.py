"""What keeps a secant method from going astray: steps that are taken back, histories that begin anew.

Three things are watched, for each sample by itself:

- *growth*: the residual after an accelerated step exceeds the best one by a factor. The step is refused: half
  a Picard step is taken from the iterate before, and the sample begins a new history.
- *singular*: the small system has no solution to speak of. The step is a Picard step, and the sample begins a
  new history.
- *stagnation*: the best residual did not improve within a window of steps. The sample begins a new history.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import anyone
from .history import History


@dataclass(eq=False)
class Safeguards:
    """What is known of the residuals and the last steps of a batch. A step changes it in place."""

    growth: float  # times the best residual that an accelerated step may lead to
    restart: int | None  # steps in a window; None: histories never stagnate
    best: Tensor  # (B,), smallest residual
    best_before_window: Tensor  # (B,), the smallest residual when the window began; infinity: not yet known
    window: int = 0  # steps since the window began
    plain: Tensor | None = None  # (B,), bool, samples whose last step was a Picard step; None: nobody
    singular: Tensor | None = None  # (B,), bool, those of them whose system had no solution; None: nobody
    watched: Tensor | None = None  # (B,), bool, samples that another method moves; None: nobody

    @classmethod
    def begin(
        cls,
        growth: float,
        restart: int | None,
        states: Tensor,  # (B, D), tells batch, type and device
    ) -> Safeguards:
        """Nothing known."""
        unknown = states.new_full((states.shape[0],), torch.inf)
        return cls(growth, restart, unknown, unknown)

    def judge(
        self,
        residual: Tensor,  # (B,), its norm
        best: Tensor,  # (B,), the smallest before
        all_improved: bool,
        history: History,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Judge the last step of every sample that is not finished, and let histories begin anew.

        Args:
            residual: norms after the step.
            best: the smallest norms before it.
            all_improved: whether the host knows that all of them are smaller now.
            history: of the samples. Those that stagnate, or whose system was singular, begin it anew.

        Returns:
            The samples that must undo the step, and those that stagnate, bool (B,); `None`: nobody.
        """
        refused = stagnated = None
        # A plain step is never refused, so refusing cannot go on for ever.
        if history.count and not all_improved:
            refused = ~(residual <= self.growth * best)  # true for NaN
            refused = _without(refused, self.plain, history.finished, self.watched)
            refused = refused if anyone(refused) else None
        self.best = residual if all_improved else torch.fmin(self.best, residual)
        if self.singular is not None:
            history.drop(self.singular)
            self.singular = None
        self.window += 1
        if self.restart is not None and self.window >= self.restart:
            stagnated = (self.best >= self.best_before_window) & (self.best < torch.inf)
            stagnated = _without(stagnated, history.finished, self.watched)
            self.best_before_window, self.window = self.best, 0
            stagnated = stagnated if history.count and anyone(stagnated) else None
            if stagnated is not None:
                history.drop(stagnated)
        return refused, stagnated

    def solved(self, history: History, singular: Tensor | None) -> None:
        """Take note of the step that comes next: which samples have no columns or no coefficients for it."""
        self.plain, self.singular = history.without_columns(), singular
        if singular is not None:
            self.plain = singular if self.plain is None else self.plain | singular
            self.singular = singular if self.watched is None else singular & ~self.watched

    def watch(
        self,
        which: Tensor,  # (B,), bool
    ) -> None:
        """Another method moves these samples from now on: no step of theirs is judged."""
        self.watched = which if self.watched is None else self.watched | which

    def take_over(
        self,
        which: Tensor,  # (B,), bool
        best: Tensor,  # (B,), the smallest residual of each
        step: int,  # evaluations of the solve before this one
    ) -> None:
        """Samples that were watched are judged from now on, as those of a solve that began at step 0."""
        watched = ~which if self.watched is None else self.watched & ~which
        self.watched = watched if anyone(watched) else None
        self.best = torch.where(which, best, self.best)
        self.best_before_window = torch.where(which, torch.inf, self.best_before_window)
        if self.restart is not None:
            self.window = step % self.restart


def _without(which: Tensor, *exempt: Tensor | None) -> Tensor:
    """Samples, bool (B,), without those that are exempt; `None`: nobody is."""
    for others in exempt:
        which = which if others is None else which & ~others
    return which

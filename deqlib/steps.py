"""Which step of its solve an evaluation belongs to: for cells that ask, and for samples that take fewer.

A solve of a fixed number of steps may take another number for each sample, and be a part of more steps
(`Course`). `Pace` goes through it. `Clock` is where the driver leaves the number of the step that comes, and
where the map finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """Where in its solve a sample is: what a cell gets as `step` where `with_step=True`.

    Attributes:
        number: steps that each sample has taken so far, int64, shape (B,): 0 at the starting point. A sample
            that is finished keeps its number. Evaluations at the value that is returned, such as those for
            its gradient and its `aux`, have the number of steps that led to it.
        total: how many steps it takes in all, int64, shape (B,): those asked for, or drawn; with a tolerance
            `Stopping.max_steps`, the most that it may take.
    """

    number: Tensor
    total: Tensor


@dataclass
class Clock:
    """The step that the next evaluation of a map belongs to.

    Attributes:
        step: of the samples that the map sees.
    """

    step: Step | None = None

    def take(self, samples: Tensor) -> Clock:
        """A clock of these samples alone, which begins where this one is."""
        now = self.step
        return Clock(None if now is None else Step(now.number[samples], now.total[samples]))


Steps = int | list[int]  # the same for all samples, or one number each


@dataclass(frozen=True, eq=False)
class Course:
    """A fixed number of steps, sample by sample, which may be a part of more.

    Attributes:
        steps: to be taken. A sample that has taken its own stands still.
        before: taken before.
        total: of all parts.
    """

    steps: Steps
    before: Steps
    total: Steps

    @property
    def most(self) -> int:
        """Steps until all samples have taken theirs."""
        return self.steps if isinstance(self.steps, int) else max(self.steps, default=0)


class Pace:
    """A fixed number of steps as the driver goes through them.

    Args:
        z0: the starting point, (B, D).
        num_steps: until all samples have taken theirs.
        course: of the samples; `None`: all of them take `num_steps`, and no others came before.
        clock: of the map, if its cell asks.
    """

    def __init__(self, z0: Tensor, num_steps: int, course: Course | None, clock: Clock | None) -> None:
        self._like, self._clock = z0, clock
        asked = num_steps if course is None else course.steps
        self.steps = self._of_samples(asked)  # (B,)
        self._differ = not isinstance(asked, int)
        if clock is not None:
            self._before = self._of_samples(0 if course is None else course.before)
            self._total = self._of_samples(num_steps if course is None else course.total)

    def tell(self, step: int) -> None:
        """Say that the next evaluation comes after so many steps of this solve."""
        if self._clock is not None:
            taken = self.steps.clamp_max(step) if self._differ else step
            self._clock.step = Step(self._before + taken, self._total)

    def hold(self, step: int, new: Tensor, old: Tensor) -> Tensor:
        """The new points, (B, D), but the old ones of samples that had taken their steps before this one."""
        if not self._differ:
            return new
        return torch.where((self.steps > step).unsqueeze(1), new, old)

    def _of_samples(self, numbers: Steps) -> Tensor:
        """One number for each row of the state, int64, (B,), on its device."""
        batch, device = self._like.shape[0], self._like.device
        if isinstance(numbers, int):
            return torch.zeros(batch, dtype=torch.int64, device=device) + numbers
        if len(numbers) != batch:  # `vmap` makes one batch of many, one after the other
            numbers = numbers * (batch // len(numbers))
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

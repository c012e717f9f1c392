"""Which method works on which samples, in a solve by `Auto`.

A method that comes to some samples is on *trial* there: it has a state of these samples alone, and is judged
by what it does for them. One method, the first, has samples that got it at different evaluations. If it is a
secant method it *leads* them instead: its state is of the whole batch, so that no samples need to be cut out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samples import Part, Parts, take_samples
from .base import Query, Seen, Solver, anyone, can_look, overrides
from .secant import SecantState


@dataclass(eq=False)
class Trial:
    """One method at work on some samples, all of which it got at the same evaluation. A step changes it."""

    code: int  # the place of the method, counted from 1
    since: int  # the evaluation at which it began
    lowest: Tensor  # (b,), smallest residual then
    state: Any  # of the method
    start: Tensor | None = None  # (b, D), where its samples are to be evaluated first; None: where they are
    is_last: bool = False  # whether all methods were tried before, so that it is kept
    is_over: bool = False  # whether all of its samples are finished
    own: Tensor | None = None  # (b,), smallest residual since it began, of methods after the first
    own_at: Tensor | None = None  # (b,), int64, the evaluation that was at

    def stuck(self, told: Seen) -> Tensor:
        """Evaluations since the last progress, int64, (b,): since that of its own, of a later method."""
        return told.since if self.own_at is None else told.step - self.own_at


@dataclass(eq=False)
class Lead:
    """A secant method at work on samples that it got at different evaluations. A step changes it.

    It sees all samples of the batch: what other methods do with theirs makes columns of the history too. Of
    the next iterates that it proposes, those of the samples that it leads alone are taken.
    """

    led: Tensor  # (B,), bool, the samples that it works on
    since: Tensor  # (B,), int64, the evaluation at which it got each
    begun: tuple[int, ...]  # all numbers that are in `since`
    lowest: Tensor  # (B,), smallest residual then
    state: SecantState
    finished: Tensor | None = None  # (B,), bool, as of the last evaluation; None: nobody
    is_over: bool = False  # whether all of its samples are finished

    def freeze(self, finished: Tensor | None) -> None:
        """Take note of the finished samples, bool (B,), the same tensor until more are; `None`: nobody."""
        if finished is not self.finished:
            self.finished = finished
            self._look()

    def let_go(self, which: Tensor) -> None:
        """Leave samples, bool (B,), to other methods."""
        self.led = self.led & ~which
        self.state.watch(which)
        self._look()

    def _look(self) -> None:
        if not can_look(self.led):
            return
        at_work = self.led if self.finished is None else self.led & ~self.finished
        self.is_over = not anyone(at_work)


@dataclass(eq=False)
class AutoState:
    """What `Auto` keeps of a batch. A step changes it in place."""

    origin: Tensor  # (B, D), where the solve began
    method: Tensor  # (B,), int64, the method of each sample, 0 for the plain iteration
    falls: Tensor  # (B, methods + 1), how far each method has brought log(residual) down an evaluation
    has_plain: bool  # whether there may be samples that are left with the plain iteration
    parts: Parts  # of Trial; each sample that is neither plain nor led is in one of them
    lead: Lead | None = None  # the first method, if that is a secant method
    residuals: tuple[Tensor, ...] = ()  # the last two before this evaluation, (B,) each
    recent: tuple[tuple[Tensor, Tensor], ...] = ()  # iterates and images that a new method may learn from
    step: int | None = None  # the evaluation that was last observed; None: none was
    query: Query | None = None  # what the methods at work ask for


def rows_of(part: Part, tensor: Tensor) -> Tensor:
    """The places of a part's samples in a batch like that of `tensor`, int64, (b,)."""
    return torch.arange(len(tensor), device=tensor.device) if part.rows is None else part.rows


def seen_by(part: Part, seen: Seen) -> Seen:
    """What was measured of a part's samples."""
    return seen if part.rows is None else seen.of(part.rows)


def cut(part: Part, places: Tensor) -> Part:
    """A part with some of its samples alone; `places` (b,), int64, are theirs in the part, in order."""
    if part.rows is not None and len(places) == len(part.rows):
        return part
    rows = places if part.rows is None else part.rows[places]
    return Part(rows, take_samples(part.state, places))


def grouped(keys: Tensor, number: int) -> list[Tensor]:
    """The places of each of so many keys in `keys`, int64 (b,), in order. The host reads once."""
    counts = (keys == torch.arange(number, device=keys.device).unsqueeze(1)).sum(1).tolist()
    return list(torch.split(keys.argsort(stable=True), counts))


def observed(solver: Solver, told: Seen, state: Any) -> Any:
    """The state of a method that was told what was measured."""
    return solver.observe(told, state) if overrides(solver, "observe") else state


def move(solver: Solver, part: Part, z: Tensor, fz: Tensor) -> Tensor:
    """The next iterates (b, D) of a part's samples, out of those of the batch."""
    trial: Trial = part.state
    own, image = (z, fz) if part.rows is None else (z[part.rows], fz[part.rows])
    if trial.is_over:
        return own
    if trial.start is not None:
        start, trial.start = trial.start, None
        return start
    moved, trial.state = solver.step(own, image, trial.state)
    return moved


def ask(methods: tuple[Solver, ...], parts: Parts, z: Tensor) -> Query | None:
    """What the methods of all parts ask for, as one query; `None`: none of them ever asks.

    Args:
        methods: of `Auto`.
        parts: of Trial.
        z: (B, D), the next iterates.
    """
    if not any(overrides(methods[part.state.code - 1], "query") for part in parts.items):
        return None
    point, direction, wanted = z, None, None
    for part in parts.items:
        asked = methods[part.state.code - 1].query(part.state.state)
        if asked is None:
            continue
        rows = rows_of(part, z)
        if asked.point is not None:
            point = point.index_copy(0, rows, asked.point)
        if asked.direction is not None:
            direction = torch.zeros_like(z) if direction is None else direction
            wanted = torch.zeros(len(z), dtype=torch.bool, device=z.device) if wanted is None else wanted
            direction = direction.index_copy(0, rows, asked.direction)
            own = wanted.new_ones(len(rows)) if asked.wanted is None else asked.wanted
            wanted = wanted.index_copy(0, rows, own)
    return Query(point, direction, wanted)

"""The batch that the map sees: all samples, or those that are not finished yet.

Finished samples may leave the batch, so that an easy sample does not pay for a hard one. What is known of
them is put aside then, and the solver's state of them with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .confirmation import Claim
from .progress import Record, Samples, relative
from .samples import put_samples, take_samples
from .solution import NonConvergenceError, Solution, Status
from .solvers.base import norms
from .state import Map
from .steps import Clock, Step

_DROP = 0.25  # share of finished samples at which they leave the batch: a drop copies what stays


class Takeable(Protocol):
    """A map that can be cut to some samples of its batch."""

    def __call__(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""

    @property
    def clock(self) -> Clock | None:
        """Where it finds which step an evaluation belongs to, if its cell asks."""

    def take(self, samples: Tensor) -> Takeable:
        """The map of these samples alone, with a clock of its own."""

    @property
    def guess(self) -> str | None:
        """What is taken for the batch though nobody said so, and how to say it; `None`: nothing is."""

    @property
    def resolution(self) -> torch.dtype:
        """The coarsest type that the map computes in."""


class Batch:
    """The map, and the samples that it is evaluated at.

    Attributes:
        f: the map for the samples in the batch.
        record: what is known of them.

    Args:
        f: the map.
        record: what keeps the books.
        compact: `f` again if finished samples are to leave the batch.
        clock: of `f`, if it is to be told which step an evaluation belongs to.
        leaves_at_once: whether they do as soon as they are finished, whatever that costs: others wait for
            their places.
    """

    def __init__(
        self,
        f: Map,
        record: Record,
        compact: Takeable | None,
        clock: Clock | None = None,
        *,
        leaves_at_once: bool = False,
    ) -> None:
        self.f, self.record, self._compact, self._leaves_at_once = f, record, compact, leaves_at_once
        self._whole, self._whole_clock, self._clock = f, clock, clock
        self._held = 0  # evaluations of finished samples, one by one
        self._holds = False  # whether finished samples are held at the last evaluation
        self._left: Samples | None = None  # of all samples, as they were when the batch was last cut
        self._state: Any = None  # of the solver, likewise
        self._rows: Tensor | None = None  # which of all samples are in the batch; `None`: all
        self._measured: list[tuple[Tensor, Tensor]] = []  # residual and scale of each evaluation, if kept
        self._cuts: list[tuple[int, Tensor]] = []  # from which evaluation on the batch had which rows

    def tell(self) -> None:
        """Say which step of each sample the next evaluation belongs to."""
        if self._clock is not None:
            now = self.record.samples
            taken = torch.where(now.active, self.record.nfe, self.record.steps_of_best())
            self._clock.step = self._step(taken)

    def _step(self, taken: Tensor) -> Step:
        return Step(taken, torch.zeros_like(taken) + self.record.rule.max_steps)

    def observe(self, z: Tensor, fz: Tensor, looks: bool) -> None:
        """Record an evaluation."""
        measured = self.record.observe(z, fz, looks)
        if self.record.keeps_trace:
            self._measured.append(measured)

    def hold(self, z: Tensor) -> Tensor:
        """The next points, with finished samples at their best iterate."""
        self._holds = self._holds or not self.record.is_everyone_at_work
        return self.record.hold(z)

    def drop_finished(self, state: Any, z: Tensor, image: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Let finished samples leave the batch, if asked and if it pays.

        Returns the solver's state, the iterates and their images, of those that stay.
        """
        record = self.record
        now, batch = record.samples, len(z)
        finished = batch - record.num_active
        if self._compact is None or finished == 0:
            return state, z, image
        # The first drop costs an evaluation of all in the end: it waits until one was spent on held samples.
        self._held += finished * record.rule.check_every
        is_early = finished < _DROP * batch or (not self._cuts and self._held < batch)
        if is_early and not self._leaves_at_once:
            return state, z, image
        self._put_aside(state)
        keep = now.active.nonzero().squeeze(1)
        self._rows = keep if self._rows is None else self._rows[keep]
        self._cuts.append((len(self._measured), self._rows))
        part = self._compact.take(self._rows)
        self.f, self._clock = _tried(self._compact, part, len(self._rows)), part.clock
        record.cut(keep)
        return take_samples(state, keep), z[keep], image[keep]

    def _put_aside(self, state: Any) -> None:
        """Bring what is known of all samples up to date."""
        now = self.record.settled()
        if self._rows is None or self._left is None:
            self._left, self._state = now, state
            return
        batch = len(self._left.active)
        none = torch.zeros_like(self._left.num_steps)
        left = replace(self._left, refused=dict.fromkeys(now.refused, none) | self._left.refused)
        self._left = put_samples(left, self._rows, now, batch)
        self._state = put_samples(self._state, self._rows, state, batch)

    def claim(self, z: Tensor, fz: Tensor, state: Any, name: str) -> Claim:
        """What was found, once the loop has ended.

        Args:
            z: where the last evaluation was, of the samples that are still in the batch, (B, D).
            fz: images of the last evaluation, of the samples that are still in the batch.
            state: the solver's last.
            name: the solver's.
        """
        record = self.record
        record.end(z)
        self._put_aside(state)
        found = self._left
        assert found is not None
        if self._whole_clock is not None:
            # From here on whoever evaluates the map does so at the value.
            self._whole_clock.step = self._step(found.best_step.clone())
        at_best, trace = self._relatives(found)
        solution = Solution(
            # A copy: an iterate may be the caller's own tensor, or one that the cell handed out.
            value=found.best.clone(),
            residual=found.best_residual,
            relative_residual=at_best,
            num_steps=found.num_steps,
            status=found.status,
            nfe=record.nfe,
            sample_nfe=found.sample_nfe,
            trace=trace,
            method=found.method,
            methods=record.methods or (name,),
            rejections=found.refused,
            state=self._state,
            place_steps=_place_steps(found),
        )
        is_open, is_last = False, not self._cuts and record.is_best()
        objection = self._objection()
        if not is_last:
            is_measured_anew = objection is not None or record.holds_places
            is_open = is_measured_anew or bool((found.status == Status.CONVERGED).any())
        claim = Claim(solution, self._whole, record.rule, record.unit_norms, is_open, objection)
        if not (is_last and (self._holds or record.holds_places)):
            return claim
        # The last evaluation was of the whole batch at the value, and is measured already. Of a few samples
        # nobody has looked whether norms of finished ones are within the range of float32.
        is_measured = record.unit_norms is None and not record.is_small
        settled = claim.by(record.residual, record.scale) if is_measured else claim.decided(fz)
        return replace(claim, solution=settled)

    def _objection(self) -> Callable[[Solution, Tensor], Solution] | None:
        """What `Claim` asks where the batch was cut by a guess."""
        if not self._cuts or self._compact is None or self._compact.guess is None:
            return None
        compact, parts = self._compact, [rows for _, rows in self._cuts]
        return lambda found, image: _without_objection(compact, parts, found, image)

    def _relatives(self, found: Samples) -> tuple[Tensor, Tensor | None]:
        """Relative residuals of the values, (B,), and of all evaluations if they were kept."""
        if not self.record.keeps_trace:
            return relative(found.best_residual, found.best_scale), None
        trace = self._trace(found)
        at_best = trace.gather(0, found.best_step.unsqueeze(0)).squeeze(0)
        # What came after a sample had ended says nothing: it repeats its value's.
        steps = torch.arange(len(trace), device=trace.device).unsqueeze(1)
        return at_best, torch.where(steps > found.num_steps, at_best, trace)

    def _trace(self, found: Samples) -> Tensor:
        """Relative residual of every evaluation and sample, (evaluations, B); 0 where one took no part."""
        ends = [first for first, _ in self._cuts] + [len(self._measured)]
        parts, start, rows = [], 0, None
        for (_, following), end in zip([*self._cuts, (0, None)], ends, strict=True):
            if end > start:
                residual, scale = (
                    torch.stack(norms) for norms in zip(*self._measured[start:end], strict=True)
                )
                part = relative(residual.flatten(), scale.flatten()).view_as(residual)
                if rows is not None:
                    part = part.new_zeros(len(part), len(found.active)).index_copy(1, rows, part)
                parts.append(part)
            start, rows = end, following
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _place_steps(found: Samples) -> Tensor | None:
    """Steps of each place, int64, (B, U), where places stand still one by one."""
    held_at = found.held_at
    return None if held_at is None else torch.where(held_at < 0, found.num_steps.unsqueeze(1), held_at)


def _tried(compact: Takeable, part: Map, number: int) -> Map:
    """The map of so many samples alone; where it fails at first, the cut is named.

    Raises:
        ValueError: the map fails at its first evaluation.
    """
    works = False

    def image(z: Tensor) -> Tensor:
        nonlocal works
        try:
            image = part(z)
        except (NonConvergenceError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if works:
                raise
            lines = str(error).strip().splitlines() or [""]
            raise ValueError(
                f"compact: the cell took all samples, and fails on {number} of them alone "
                f"({type(error).__name__}: {lines[0]}); {_ways_out(compact)}"
            ) from error
        works = True
        return image

    return image


def _without_objection(compact: Takeable, parts: list[Tensor], found: Solution, image: Tensor) -> Solution:
    """The solution, unless samples failed and a cut map gives other images than that of the whole batch.

    A sample that failed is asked about in the last batch that it was in, which costs an evaluation of each of
    these batches: mostly one, of few samples.

    Args:
        compact: the map.
        parts: the samples that it was cut to, one time after the other, (b,) each.
        found: the solution, settled.
        image: of the whole batch at its value, (B, D).

    Raises:
        ValueError: see above.
    """
    unexplained, value = found.status != Status.CONVERGED, found.value.detach()
    for rows in reversed(parts):
        if not bool(unexplained[rows].any()):
            continue
        unexplained = unexplained.index_fill(0, rows, False)
        with torch.no_grad():
            part = compact.take(rows)(value[rows])
        apart, scale, size = norms(part - image[rows], image[rows], value[rows])
        room = torch.finfo(compact.resolution).eps ** 0.5 * torch.maximum(scale, size)
        differ = ~(apart <= room) & scale.isfinite()
        if bool(differ.any()):
            raise ValueError(
                f"compact: the cell gives {int(differ.sum())} of {len(rows)} samples another image alone "
                "than in the whole batch: the cut is wrong, or samples depend on one another; "
                f"{_ways_out(compact)}"
            )
        evaluated = found.sample_nfe.index_add(0, rows, torch.ones_like(rows))
        found = replace(found, nfe=found.nfe + 1, sample_nfe=evaluated)
    return found


def _ways_out(compact: Takeable) -> str:
    """What to do where a cut does not fit."""
    outside = (
        "what the cell captures cannot be cut and belongs in args; where samples depend on one another, "
        "compact=False"
    )
    guess = compact.guess
    if guess is None:
        guess = "say in compact=(...) which axis of every input is the batch, None for a shared one"
    return f"{guess}; {outside}"

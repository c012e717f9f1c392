"""What the driver knows of samples that may be done, or go on, by more than their residual.

Beside the tolerance a readout may say that a sample is done, no sample may be done before some steps, a value
may be the last iterate, and the places of a sample may stand still one by one. Where a place stands still the
solver sees its point as its image: a fixed point by definition, so that the residual of a sample is that of
its places at work, and everything else is as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .progress import Record, UnitNorms
from .samples import take_samples
from .solution import Status
from .solvers.base import anyone
from .state import Layout
from .stopping import Stopping


class ExitingRecord(Record):
    """A `Record` for any rule; `Record` itself is for one that goes by residuals alone.

    Args:
        z0: starting point, (B, D).
        rule: when a sample is done.
        unit_norms: norms to judge a sample by.
        may_recover: whether the solver may take a blow-up back with its next step.
        layout: how a state lies in (B, D); needed for a readout and for places that stand still.
    """

    def __init__(
        self,
        z0: Tensor,  # (B, D)
        rule: Stopping,
        unit_norms: UnitNorms | None,
        *,
        may_recover: bool,
        layout: Layout | None,
    ) -> None:
        super().__init__(z0, rule, unit_norms, may_recover=may_recover)
        self.guards = self.is_small = False  # what they save goes by residuals alone
        self._layout = layout
        self._z = self._image = z0  # of the evaluation under way
        self._reading: Tensor | None = None  # of the last image
        self._exits = torch.zeros_like(self.samples.active)  # done now, and not by the residual
        self._was_met = self._exits  # the tolerance, at this evaluation or before
        self._still: Tensor | None = None  # numbers that stand still, bool, (B, D); `None`: none
        if rule.hold_places:
            assert unit_norms is not None
            self.samples.held_at = torch.full_like(unit_norms(z0), -1, dtype=torch.int64)

    @property
    def holds_places(self) -> bool:
        """Whether places may stand still, each at an evaluation of its own."""
        return self.rule.hold_places

    def observe(self, z: Tensor, fz: Tensor, looks: bool) -> tuple[Tensor, Tensor]:
        """Count and measure an evaluation, see `Record`."""
        self._z, self._image = z, self.moving(z, fz)
        found = super().observe(z, self._image, looks)
        self._image = z  # the image is kept no longer than it is needed
        return found

    def moving(
        self,
        z: Tensor,  # (B, D)
        image: Tensor,  # (B, D)
    ) -> Tensor:
        """The image as the solver is to see it, (B, D): where a place stands still, its point."""
        return image if self._still is None else torch.where(self._still, z, image)

    def hold(self, z: Tensor) -> Tensor:
        """The next points, (B, D), with finished samples, and places that stand still, as they are."""
        return super().hold(z if self._still is None else torch.where(self._still, self._z, z))

    def cut(self, keep: Tensor) -> None:
        """Leave these samples in the batch alone, all of them at work."""
        super().cut(keep)
        self._z, self._image, self._exits, self._was_met, self._reading, self._still = take_samples(
            (self._z, self._image, self._exits, self._was_met, self._reading, self._still), keep
        )

    def end(
        self,
        z: Tensor,  # (B, D)
    ) -> None:
        """There will be no more steps; `z` is what was evaluated last."""
        if self.rule.keeps_last:
            broken = self.samples.broken
            self._keep_last(z, self.samples.active if broken is None else self.samples.active & ~broken)

    def _masks(self) -> Tensor:
        """As `Record` has them, with *done* in the place of *met*."""
        met, better, sound = super()._masks().unbind(0)
        if self.rule.min_steps:
            # A sample that has to go on at its solution is at its best there, whatever rounding makes of its
            # residual, and what blew up cannot be told from residuals of nothing but rounding.
            self._was_met = self._was_met | met
            better, sound = better | met, sound | (self._was_met & (self.residual < torch.inf))
        may_leave = self.samples.active & sound & (self.residual < torch.inf)
        places = met.unsqueeze(1) if self.places_met is None else self.places_met
        if self.rule.readout is not None:
            answers = self._answers(len(met))
            places = places | (answers.all(1, keepdim=True) if self.places_met is None else answers)
        if self.step < self.rule.min_steps:
            met, places = torch.zeros_like(met), torch.zeros_like(places)
        self._exits = places.all(1) & may_leave & ~met
        self._stop(places & may_leave.unsqueeze(1))
        return torch.stack([met | self._exits, better, sound])

    def _answers(self, batch: int) -> Tensor:
        """What the readout says of each place, bool, (B, U), or of each sample, (B, 1)."""
        readout = self.rule.readout
        assert readout is not None
        with torch.no_grad():
            is_read = self.follows_image and self._reading is not None
            reading = self._reading if is_read else self._read(self._z)
            self._reading = self._read(self._image) if readout.compares else None
            assert reading is not None
            said = readout.is_done(reading, self._reading)
        name = type(readout).__name__
        if not isinstance(said, Tensor) or said.dtype != torch.bool or said.dim() == 0 or len(said) != batch:
            got = f"{tuple(said.shape)} in {said.dtype}" if isinstance(said, Tensor) else type(said).__name__
            raise ValueError(
                f"{name}: is_done must return bool, one answer a sample, ({batch},), or one a place, "
                f"({batch}, places...), got {got}"
            )
        answers = said.flatten(1) if said.dim() > 1 else said.unsqueeze(1)
        if readout.num_in_a_row > 1:
            before, now = self.samples.streak, answers.to(torch.int64)
            self.samples.streak = now if before is None else (before + 1) * now
            answers = self.samples.streak >= readout.num_in_a_row
        return answers if self.places_met is None else self._by_place(answers, said)

    def _read(self, flat: Tensor) -> Tensor:
        """What the head makes of a state, (B, ...)."""
        assert self._layout is not None
        assert self.rule.readout is not None
        state = self._layout.of_batch(len(flat)).unravel(flat.detach())
        try:
            reading = self.rule.readout.head(state)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(
                f"{type(self.rule.readout).__name__}: head uses tensors that torch.func.vmap batches, and a "
                "solve, which holds the samples of all batches, cannot tell which is whose; leave the "
                "readout out there"
            ) from error
        if not isinstance(reading, Tensor) or reading.dim() == 0 or len(reading) != len(flat):
            got = f"shape {tuple(reading.shape)}" if isinstance(reading, Tensor) else type(reading).__name__
            raise ValueError(
                f"{type(self.rule.readout).__name__}: head must return a tensor whose first axis is the "
                f"batch of {len(flat)}, got {got}"
            )
        return reading

    def _by_place(self, answers: Tensor, said: Tensor) -> Tensor:
        """Answers as (B, U), or (B, 1): places on every leaf of the state are asked by the same answers."""
        assert self.places_met is not None
        assert self._layout is not None
        number, places = answers.shape[1], self.places_met.shape[1]
        if number not in (1, places) and number * len(self._layout.shapes) == places:
            return answers.repeat(1, len(self._layout.shapes))
        if number not in (1, places):
            raise ValueError(
                f"{type(self.rule.readout).__name__}: with norm_axes={self.rule.norm_axes} is_done must "
                f"return one answer a sample or one for each of {places} places, got {tuple(said.shape)}"
            )
        return answers

    def _stop(self, done: Tensor) -> None:
        """Let these places stand still from now on, bool, (B, U)."""
        held_at = self.samples.held_at
        if held_at is None or not anyone(done.any(1)):
            return
        new = done & (held_at < 0)
        self.samples.held_at = held_at.masked_fill(new, self.step)
        assert self._layout is not None
        assert self.rule.norm_axes is not None
        self._still = self._layout.spread(self.samples.held_at >= 0, self.rule.norm_axes)
        # They do not go on to their image: what was read there is of another state than the next one.
        self._reading = None
        if self.difference is not None:
            self.difference = self.difference.masked_fill(self._still, 0)

    def _retire(
        self, met: Tensor | None, broken: Tensor | None, stalled: Tensor | None, num_met: int | None
    ) -> None:
        """Finish samples at work, see `Record`; what is done by more than its residual is EXITED."""
        if stalled is not None and self.rule.keeps_last:
            self._keep_last(self._z, stalled if broken is None else stalled & ~broken)
        super()._retire(met, broken, stalled, num_met)
        if met is not None:
            self.samples.status = self.samples.status.masked_fill(met & self._exits, int(Status.EXITED))

    def _keep_last(self, z: Tensor, which: Tensor) -> None:
        """Make this the value of these samples, bool, (B,), if it is one to return."""
        improved = self.improved
        self._keep(z, which & (self.residual < torch.inf))
        self.improved = improved | self.improved

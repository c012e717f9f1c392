"""What the driver knows of every sample while it iterates, and what it learns from an evaluation.

A sample is *at work* until it is finished: until it meets the tolerance, blows up, or stalls. At every
evaluation three things are asked of each sample at work, and the answers are masks, bool (B,):

- *met*: its residual meets the tolerance;
- *better*: its residual is the smallest so far, by more than rounding, so the iterate is kept as its best;
- *sound*: its residual has not blown up. A sample that is not sound is *broken*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .samples import take_samples
from .solution import Status
from .solvers.base import FEW, SAFE, anyone, can_look, norm, norms
from .stopping import Stopping

UnitNorms = Callable[[Tensor], Tensor]  # (B, D) -> (B, U), norms of the parts that must all converge

_SMALL, _LARGE = 8, 2**20  # numbers of a state, and of a trace


def measure(
    difference: Tensor,  # (B, D), f(z) - z
    fz: Tensor,  # (B, D)
    unit_norms: UnitNorms | None,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Norms of a residual and of the image it is relative to, (B,) or (B, U) each, off the tape."""
    if unit_norms is not None:
        return unit_norms(difference.detach()), unit_norms(fz.detach())
    if exact:
        residual, scale = norms(difference, fz)
        return residual, scale
    return norm(difference), norm(fz)


def relative(residual: Tensor, scale: Tensor) -> Tensor:
    """Relative residual of each sample, (B,).

    It is 0 where the residual is 0, also at a fixed point at the origin, and NaN where both norms are
    infinite. That of a sample of several units is the largest of theirs.
    """
    found = residual / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return found.amax(1) if found.dim() == 2 else found


def _constants(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers of the type and on the device of a tensor, which the host does not wait for."""
    if can_look(like):
        return like.new_tensor(numbers)
    return torch.cat([like.new_full((1,), number) for number in numbers])  # what is copied is waited for


@dataclass
class Samples:
    """Tensors of the samples in the batch, each with the batch as its first axis."""

    active: Tensor  # bool
    lowest: Tensor  # smallest residual so far; minus infinity once the sample is finished
    floor: Tensor  # the absolute tolerance; minus infinity once the sample is finished
    best: Tensor  # (B, D), the best iterate
    best_residual: Tensor  # at `best`; of samples at work it is brought up to date when they finish
    best_scale: Tensor  # what `best_residual` is relative to, where no trace is kept that says it
    best_step: Tensor  # int64, the evaluation that `best` was at
    begun: Tensor  # int64, the evaluation from which the patience with a sample counts
    status: Tensor  # int64
    num_steps: Tensor  # int64, of finished samples; that of the others is the current step
    sample_nfe: Tensor  # int64, counted up to the last time the batch changed
    method: Tensor  # int64
    broken: Tensor | None = None  # bool, blown up at the last evaluation; `None`: nobody
    held_at: Tensor | None = None  # int64, (B, U), the evaluation from which a place stands still, or -1
    streak: Tensor | None = None  # int64, (B, answers), evaluations in a row that a readout said yes at
    refused: dict[str, Tensor] = field(default_factory=dict)  # int64, steps taken back, by cause

    @classmethod
    def start(cls, z0: Tensor, rule: Stopping) -> Samples:
        """All samples at work, before the first evaluation."""
        batch = z0.shape[0]
        zeros = torch.zeros(batch, dtype=torch.int64, device=z0.device)
        unknown = z0.new_full((batch,), torch.inf)
        return cls(
            active=torch.ones_like(zeros, dtype=torch.bool),
            lowest=unknown,
            floor=z0.new_full((batch,), rule.atol),
            best=z0,
            best_residual=unknown,
            best_scale=unknown,
            best_step=zeros,
            begun=zeros,
            status=zeros + int(Status.MAX_STEPS),
            num_steps=zeros,
            sample_nfe=zeros,
            method=zeros,
        )


class Record:
    """Counts and measures evaluations, keeps each sample's best iterate, retires samples that are finished.

    Most evaluations are better for every sample at work and finish none. Where the host can read numbers,
    that case is found out first, at the cost of eight small operations, and ends the matter. With few samples
    three operations are enough, which measure, since Python compares the numbers. `_update` does the rest.
    """

    def __init__(
        self, z0: Tensor, rule: Stopping, unit_norms: UnitNorms | None, *, may_recover: bool
    ) -> None:
        self.rule, self.unit_norms = rule, unit_norms
        self.may_recover = may_recover  # whether the solver may take a blow-up back with its next step
        self.samples = Samples.start(z0, rule)
        self.num_active = z0.shape[0]  # as of the last time the host looked
        self.is_known = True  # whether that is still so
        self._num_elsewhere = (0, 0)  # at which evaluation how many samples were not at their best iterate
        self._written = 0  # the value of `improved_at` that `samples.best_step` is up to date with
        self.improved_at = 0  # the last evaluation that the host knows improved on all samples at work
        self.nfe = 0  # evaluations so far, this one included
        self._counted = 0  # those that are in `samples.sample_nfe` already
        self.looks = True  # whether the host reads from the device at this step
        eps = torch.finfo(z0.dtype).eps
        self.constants = _constants((1 - eps, rule.blowup, rule.rtol or 0), z0)
        # Factors that give, of the smallest residual, what improves on it and what is a blow-up.
        self.factors = self.constants[:2].unsqueeze(1)
        # The trace of a large batch of small states would be many times what the states are.
        self.keeps_trace = z0.shape[1] >= _SMALL or len(z0) * (rule.max_steps + 1) <= _LARGE
        # Whether norms are taken in float32 first, and in float64 where one is beyond `SAFE`.
        self.guards = z0.dtype == torch.float32 and unit_norms is None and can_look(z0)
        self.range = z0.new_tensor(SAFE if self.guards else ()).unsqueeze(1).expand(-1, len(z0))
        self.is_small = can_look(z0) and len(z0) <= FEW and unit_norms is None
        self.factor = 1 - eps
        self._limits: list[tuple[float, float]] | None = None  # `lowest` and `floor` of a few samples
        self.difference: Tensor | None = None
        self.residual = self.scale = self.before = self.improved = z0.new_zeros(0)
        self._goal: Tensor | None = None  # made when it is asked for
        self._floor = self.samples.floor  # as it was at the evaluation
        self.all_improved = False
        self.methods: tuple[str, ...] = ()  # if the solver has several
        self._finished: Tensor | None = None  # made when it is asked for
        self.follows_image = False  # whether the next iterate is the image of the last, as it is
        self.places_met: Tensor | None = None  # bool, (B, U), of samples with several units

    @property
    def step(self) -> int:
        """Evaluations before this one, which is as many as steps were taken."""
        return self.nfe - 1

    def count(self) -> int:
        """How many samples are at work. Waits for the device if the host does not know."""
        if not self.is_known:
            known = torch.stack([self.samples.active.sum(), self._elsewhere().sum()]).tolist()
            self.num_active, self.is_known = known[0], True
            self._num_elsewhere = (self.nfe, known[1])  # what `is_best` asks, by the same wait
        return self.num_active

    @property
    def is_everyone_at_work(self) -> bool:
        """Whether the host knows that nobody is finished."""
        return self.is_known and self.num_active == len(self.samples.active)

    @property
    def goal(self) -> Tensor:
        """The residual that meets the tolerance, (B,)."""
        if self._goal is None:
            self._goal = torch.add(self._floor, self.scale, alpha=self.rule.rtol or 0)
        return self._goal

    @property
    def finished(self) -> Tensor | None:
        """The samples that are finished, bool, (B,), the same tensor until more are; `None`: nobody."""
        if self.is_everyone_at_work:
            return None
        if self._finished is None:
            self._finished = ~self.samples.active
        return self._finished

    def is_best(self) -> bool:
        """Whether every sample was at its best iterate at the last evaluation.

        Waits for the device if the host did not know either how many were at work then.
        """
        if self.all_improved:
            return True
        nfe, number = self._num_elsewhere
        return number == 0 if nfe == self.nfe else not bool(self._elsewhere().any())

    def _elsewhere(self) -> Tensor:
        """The samples that were not at their best iterate at the last evaluation, bool, (B,).

        Those that had finished before it were held at it.
        """
        return (self.before > -torch.inf) & ~self.improved

    def cut(self, keep: Tensor) -> None:
        """Leave these samples in the batch alone, all of them at work."""
        self.steps_of_best()
        self._goal = self.goal[keep]
        self.samples = take_samples(self.samples, keep)
        self.num_active, self._finished, self._limits = len(keep), None, None
        self.range = self.range[:, : len(keep)]
        self.residual, self.scale, self.before, self.improved = (
            known[keep] for known in (self.residual, self.scale, self.before, self.improved)
        )
        if self.difference is not None:
            self.difference = self.difference[keep]

    def observe(self, z: Tensor, fz: Tensor, looks: bool) -> tuple[Tensor, Tensor]:
        """Count and measure an evaluation; returns the two norms that the trace is made of, (B,) each.

        Args:
            z: the iterate, (B, D).
            fz: its image, (B, D).
            looks: whether the host waits for the device at this step anyway.
        """
        self.nfe += 1
        step, self.looks, now = self.step, looks or can_look(z), self.samples
        recorded = torch.is_grad_enabled() and (z.requires_grad or fz.requires_grad)
        difference = fz.detach() - z.detach() if recorded else fz - z
        self.difference = None if recorded else difference
        self._measure(difference, fz, exact=step == 0 or not self.guards)
        if self.is_small and step and self._improves_on_all():
            self.before, self.improved, self.all_improved = now.lowest, now.active, True
            self._keep_all(z)
            now.broken = None
            return self.residual, self.scale
        met, better, sound, counts = self._compare()
        if counts is not None and self.guards and (counts[3] > 0 or counts[4] < len(z)):
            self._measure(difference, fz, exact=True)
            met, better, sound, counts = self._compare()
        self._limits = None
        self._update(z, met, better, sound, counts)
        return self.residual, self.scale

    def best(self) -> Tensor:
        """The best iterate of every sample, (B, D), which stays as it is."""
        return self.samples.best

    def hold(self, z: Tensor) -> Tensor:
        """The next points, (B, D), with finished samples at their best iterate."""
        if self.is_everyone_at_work:
            return z
        return torch.where(self.samples.active.unsqueeze(1), z, self.best())

    def moving(
        self,
        z: Tensor,  # (B, D)
        image: Tensor,  # (B, D)
    ) -> Tensor:
        """The image as the solver is to see it, (B, D): where a place stands still, its point."""
        return image

    @property
    def holds_places(self) -> bool:
        """Whether places may stand still, each at an evaluation of its own."""
        return False

    def end(
        self,
        z: Tensor,  # (B, D)
    ) -> None:
        """There will be no more steps; `z` is what was evaluated last."""

    def settled(self) -> Samples:
        """What is known of the samples in the batch, all of it brought up to date."""
        now = self.samples
        now.best_step = self.steps_of_best()
        now.sample_nfe = now.sample_nfe + (self.nfe - self._counted)
        now.num_steps = torch.where(now.active, self.step, now.num_steps)
        now.best_residual = torch.where(now.active, now.lowest, now.best_residual)
        self._counted = self.nfe
        return now

    def _measure(self, difference: Tensor, fz: Tensor, *, exact: bool) -> None:
        """Take the residual, the goal that meets the tolerance, and the norm that both are relative to."""
        residual, scale = measure(difference, fz, self.unit_norms, exact=exact)
        rtol, floor = self.rule.rtol or 0, self.samples.floor
        self._floor, self._goal = floor, None
        if residual.dim() == 2:
            # As one number: the residual of the worst unit, and the goal that is met when all units are.
            limits = floor.unsqueeze(1) + rtol * scale
            self.places_met = residual <= limits
            # Of a unit that meets them nothing is asked: padding is 0 of 0, which is no share.
            shares = torch.where(self.places_met, 0, residual / limits)
            met = self.places_met.all(1)
            worst, far = relative(residual, scale), residual.amax(1)
            # Where nothing is left of a residual nothing can be divided by it.
            residual, scale = far, torch.where(worst == 0, scale.amax(1), far / worst)
            goal = torch.where(met, far, far / shares.amax(1).clamp_min(2))
            # Written out for finished samples: a residual of 0 would be within any share of itself.
            self._goal = torch.where(floor == -torch.inf, floor, goal)
        self.residual, self.scale = residual, scale

    def _improves_on_all(self) -> bool:
        """Whether this evaluation is better for all samples at work and finishes none of them.

        Python compares the numbers: for a few samples it is done before PyTorch has started an operation.
        """
        if self._limits is None:
            known = self.samples.lowest.tolist(), self.samples.floor.tolist()
            self._limits = list(zip(*known, strict=True))
        low, high = SAFE if self.guards else (0.0, torch.inf)
        # What is as near to the goal as rounding is left to `_compare`, whose word counts.
        rtol, margin, limits = self.rule.rtol or 0, 1 + 4 * (1 - self.factor), []
        measured = zip(self._limits, self.residual.tolist(), self.scale.tolist(), strict=True)
        for (lowest, floor), residual, scale in measured:
            if lowest == -torch.inf:  # finished
                residual = lowest
            elif not max(low, margin * (floor + rtol * scale)) < residual <= min(high, self.factor * lowest):
                return False  # also where a number is not finite
            limits.append((residual, floor))
        self._limits = limits
        return True

    def _compare(self) -> tuple[Tensor, Tensor, Tensor, list[int] | None]:
        """The masks met, better and sound, and how many samples each holds for, if the host looks."""
        within = self._masks()
        counts: list[int] | None = within.sum(1).tolist() if self.looks else None
        return within[0], within[1], within[2], counts

    def _masks(self) -> Tensor:
        """Met, better, sound, and within the range of float32 if that is asked, bool, (3 or 4, B).

        None of the first three holds for a finished sample, whose limits are minus infinity.
        """
        limits = [self.goal.unsqueeze(0), self.samples.lowest * self.factors]
        if self.guards:
            limits.append(self.range)
        return self.residual <= torch.cat(limits)

    def _update(
        self, z: Tensor, met: Tensor, better: Tensor, sound: Tensor, counts: list[int] | None
    ) -> None:
        """Keep the iterates of the samples that got better, and retire those that are finished now."""
        now, first = self.samples, self.step == 0
        self.before, self.improved = now.lowest, better
        known = counts if self.is_known else None  # how many of those at work, if that is sure
        self.all_improved = first or (known is not None and known[1] == self.num_active)
        any_met = counts is None or counts[0] > 0
        if self.all_improved:
            self._keep_all(z)
            if not (any_met or first):
                now.broken = None
                return
        is_finite = counts is not None and self.guards and counts[4] == len(z)
        if any_met and not is_finite:
            met = met & (self.residual < torch.inf)  # infinity is within any tolerance of infinity
        if not self.all_improved:
            self._keep(z, better | met if any_met else better)
        broken = None
        if first:
            broken = None if is_finite else ~(self.residual < torch.inf)
        elif known is None or known[2] < self.num_active:
            broken = now.active & ~sound
        if self.may_recover and not first:
            broken, now.broken = None if broken is None or now.broken is None else broken & now.broken, broken
        num_met = known[0] if known is not None and is_finite else None
        self._retire(met if any_met else None, broken, self._stalled(), num_met)

    def steps_of_best(self) -> Tensor:
        """The evaluation that each sample's best iterate was at, int64, (B,)."""
        now = self.samples
        if self.improved_at > self._written:
            now.best_step = now.best_step.masked_fill(now.active, self.improved_at)
            self._written = self.improved_at
        return now.best_step

    def _keep_all(self, z: Tensor) -> None:
        """Keep the iterate of every sample: those at work got better, the others are held at their best."""
        now = self.samples
        now.best, self.improved_at = z, self.step
        if not self.keeps_trace:
            now.best_scale = torch.where(now.active, self.scale, now.best_scale)
        everyone = self.is_everyone_at_work
        now.lowest = self.residual if everyone else torch.where(now.active, self.residual, now.lowest)

    def _keep(self, z: Tensor, better: Tensor) -> None:
        """Keep the iterates of these samples alone."""
        now = self.samples
        self.steps_of_best()
        now.best = torch.where(better.unsqueeze(1), z, now.best)
        now.lowest = torch.where(better, self.residual, now.lowest)
        if not self.keeps_trace:
            now.best_scale = torch.where(better, self.scale, now.best_scale)
        now.best_step = torch.where(better, self.step, now.best_step)
        self.improved = better

    def _stalled(self) -> Tensor | None:
        """The samples at work whose patience has run out, bool (B,); `None`: the host knows of none."""
        patience = self.rule.patience
        if patience is None or self.step - self.improved_at < patience:
            return None
        latest = torch.maximum(self.steps_of_best(), self.samples.begun)
        return self.samples.active & (latest <= self.step - patience)

    def _retire(
        self, met: Tensor | None, broken: Tensor | None, stalled: Tensor | None, num_met: int | None
    ) -> None:
        """Finish samples at work. One that meets the tolerance is CONVERGED, whatever else is true of it.

        Args:
            met: the samples that meet the tolerance, bool, (B,); `None`: nobody, as below.
            broken: those that blew up.
            stalled: those that make no progress; of one that also blew up, DIVERGED is the status.
            num_met: how many meet the tolerance, if the host knows.
        """
        ends = [(Status.STALLED, stalled), (Status.DIVERGED, broken), (Status.CONVERGED, met)]
        found = [(status, which) for status, which in ends if which is not None]
        if not found:
            return
        finished = found[0][1]
        for _, which in found[1:]:
            finished = finished | which
        is_counted = finished is met and num_met is not None
        if not (is_counted or anyone(finished)):
            return
        now = self.samples
        self.steps_of_best()  # before any sample stops being at work, since it writes to those at work
        for status, which in found:  # a later status overwrites an earlier one
            now.status = now.status.masked_fill(which, int(status))
        now.num_steps = now.num_steps.masked_fill(finished, self.step)
        now.best_residual = torch.where(finished, now.lowest, now.best_residual)
        now.active, self._finished = now.active ^ finished, None
        now.lowest = now.lowest.masked_fill(finished, -torch.inf)
        now.floor = now.floor.masked_fill(finished, -torch.inf)
        if is_counted and num_met is not None:
            self.num_active -= num_met
        else:
            self.is_known = False

"""The driver's bookkeeping in three kernels an evaluation, where the host is not to wait for a device.

There the driver cannot see that an evaluation is better for all samples and finishes none (`progress.py`), so
it starts thirty operations that find everything out sample by sample, most of them on one number a sample.
Here a kernel reads the states and measures, another decides everything that there is to be decided of each
sample, and a third, which comes after the solver's step, both keeps the best iterates and holds the samples
that are finished.

All of it is what `Record` computes, but for the order in which squares are added up. A sample's are added up
in parts that depend on its width alone, so no number depends on the batch or changes from run to run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..progress import Record, Samples, UnitNorms
from ..solvers.base import can_look
from ..stopping import Stopping
from . import give_up, is_available, on_device_of

MOST_NUMBERS = 2**31 - 1  # of a sample: its places are counted in 32 bits
_BLOCK = 1024  # numbers that a program goes through at a time
_MOST_PARTS = 1024  # of a sample: more than a device has use for, if there is no other sample
_TILE = 128  # parts whose sums are added up at a time


class FusedRecord(Record):
    """A `Record` that measures and judges with kernels of its own. Not for norms of units.

    An evaluation that autograd records is left to `Record`. Both keep the same, so they may take turns.
    """

    def __init__(
        self, z0: Tensor, rule: Stopping, unit_norms: UnitNorms | None, *, may_recover: bool
    ) -> None:
        super().__init__(z0, rule, unit_norms, may_recover=may_recover)
        self.guards = self.is_small = False  # what they save is not done here
        self._iterate: Tensor | None = None  # the last one, until `samples.best` was told of it
        self._owns_best = False  # whether nobody else has `samples.best`, so that it may be written to
        now = self.samples
        # Written in place, and the same tensors at first.
        now.best_step, now.num_steps = now.best_step.clone(), now.num_steps.clone()
        now.best_residual, now.best_scale = now.best_residual.clone(), now.best_scale.clone()

    def observe(self, z: Tensor, fz: Tensor, looks: bool) -> tuple[Tensor, Tensor]:
        """Count and measure an evaluation, see `Record`."""
        self.steps_of_best()  # an evaluation by `Record` may have left it to be written
        flags = self._judged(z, fz) if is_available(z, fz) else None
        if flags is None:
            return super().observe(z, fz, looks)
        self.nfe += 1
        self.looks = looks or can_look(z)
        now, first, known = self.samples, self.step == 0, self.num_active if self.is_known else None
        now.active, _, self.improved, finished = flags.unbind(0)
        self.is_known, self.all_improved = self.looks, first
        if self.looks:
            self.num_active, elsewhere = flags[:2].cpu().sum(1).tolist()
            self._num_elsewhere, self.all_improved = (self.nfe, elsewhere), first or elsewhere == 0
        if self.num_active != known or not self.is_known:
            self._finished = finished
        if self.all_improved:
            now.best, self._owns_best = z, False  # finished samples are held at it
        else:
            self._iterate = z
        return self.residual, self.scale

    def best(self) -> Tensor:
        """The best iterate of every sample, (B, D), which stays as it is."""
        now, self._owns_best = self.samples, False
        if self._iterate is not None:
            now.best = torch.where(self.improved.unsqueeze(1), self._iterate, now.best)
            self._iterate = None
        return now.best

    def settled(self) -> Samples:
        """What is known of the samples in the batch, all of it brought up to date."""
        self.best()
        return super().settled()

    def hold(self, z: Tensor) -> Tensor:
        """The next points, (B, D), with finished samples at their best iterate."""
        iterate, now = self._iterate, self.samples
        if iterate is None or self.is_everyone_at_work or not is_available(z, iterate, now.best):
            self.best()
            return super().hold(z)
        best = now.best if self._owns_best else torch.empty_like(now.best)
        held = torch.empty_like(z)
        block, part, num_parts = _split(z.shape[1])
        try:
            from .record_kernels import keep  # loads Triton

            with on_device_of(z):
                keep[len(z), num_parts](
                    *(iterate, z, now.best, best, held, self.improved, now.active, z.shape[1]),
                    IN_PLACE=self._owns_best,
                    PART=part,
                    BLOCK=block,
                    num_warps=_num_warps(block),
                )
        except Exception as error:
            give_up(error)
            return super().hold(z)
        now.best, self._owns_best, self._iterate = best, True, None
        return held

    def _judged(self, z: Tensor, fz: Tensor) -> Tensor | None:
        """Measure and judge an evaluation; returns the flags, bool (4, B), or `None` if a kernel failed."""
        now, step, patience = self.samples, self.nfe, self.rule.patience
        block, part, num_parts = _split(z.shape[1])
        difference = torch.empty_like(z) if self.may_recover else None  # whoever is told nothing needs none
        sums = torch.empty(len(z), num_parts, 2, dtype=torch.float64, device=z.device)
        flags = torch.empty(4, len(z), dtype=torch.bool, device=z.device)
        residual, scale, lowest, floor = made = [torch.empty_like(now.lowest) for _ in range(4)]
        if self.may_recover and now.broken is None:
            now.broken = torch.zeros_like(now.active)
        try:
            from .record_kernels import judge, measure  # loads Triton

            with on_device_of(z):
                measure[len(z), num_parts](
                    *(z, fz, difference, sums, z.shape[1]),
                    HAS_DIFFERENCE=self.may_recover,
                    PART=part,
                    BLOCK=block,
                    num_warps=_num_warps(block),
                )
                judge[len(z),](
                    # A number that is given to a kernel as it is would be rounded to float32.
                    *(sums, self.constants, *made, flags, now.lowest, now.floor, now.begun, now.broken),
                    *(now.best_step, now.best_residual, now.best_scale, now.status, now.num_steps),
                    *(num_parts, step, -1 if patience is None else step - patience),
                    MAY_RECOVER=self.may_recover,
                    NUM_TILES=math.ceil(num_parts / _TILE),
                    TILE=_TILE,
                    num_warps=1,
                )
        except Exception as error:
            give_up(error)
            return None
        self.difference, self.residual, self.scale = difference, residual, scale
        self.before, self._floor, self._goal, self._limits = now.lowest, now.floor, None, None
        now.lowest, now.floor = lowest, floor
        return flags


def _split(width: int) -> tuple[int, int, int]:
    """How many numbers a program takes at a time, how many a part has, and how many parts there are."""
    block = min(1 << (width - 1).bit_length(), _BLOCK)
    part = math.ceil(width / (block * _MOST_PARTS)) * block
    return block, part, math.ceil(width / part)


def _num_warps(block: int) -> int:
    return 4 if block == _BLOCK else 1

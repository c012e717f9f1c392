"""The loop of every solve, forward and adjoint.

The driver alone calls the map, so evaluations are counted exactly; it measures residuals, keeps each
sample's best iterate, decides who is done, hands samples from one method to the next, drops finished ones
from the batch if asked, and stops. It works on flat states (B, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .solution import Solution, Status
from .solvers import Solver
from .solvers.base import can_look, norms
from .state import Map, put_samples, take_samples
from .stopping import Stopping

UnitNorms = Callable[[Tensor], Tensor]  # (B, D) -> (B, U), norms of the parts that must all converge

_DROP = 0.25  # share of finished samples at which they leave the batch: a drop copies what stays


class Takeable(Protocol):
    """A map that can be cut to some samples of its batch."""

    def __call__(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""

    def take(self, samples: Tensor) -> Map:
        """The map of these samples alone."""


def iterate(
    f: Map,
    z0: Tensor,  # (B, D)
    solver: Solver,
    stopping: Stopping,
    *,
    state: Any = None,
    unit_norms: UnitNorms | None = None,
    compact: Takeable | None = None,
) -> Solution:
    """Iterate `solver` on `f` from `z0` until `stopping` says so; the solution's value is flat.

    Args:
        f: the map.
        z0: starting point.
        solver: the method, or several in turn.
        stopping: the rule.
        state: of an earlier solve, to go on with what it learnt.
        unit_norms: norms to judge a sample by; default one, over all of its numbers.
        compact: `f` again if finished samples are to leave the batch that it sees.
    """
    state = solver.init(z0) if state is None else solver.resume(state, z0)
    if stopping.is_fixed:
        return _iterate_fixed(f, z0, solver, state, stopping, unit_norms)
    return _Solve(f, z0, solver, state, stopping, unit_norms, compact).run(z0)


def _iterate_fixed(
    f: Map, z0: Tensor, solver: Solver, state: Any, stopping: Stopping, unit_norms: UnitNorms | None
) -> Solution:
    """A fixed number of steps: the value is the last iterate."""
    z, trace = z0, []
    first = solver.stages[0]
    residual = relative = None
    for _ in range(stopping.max_steps):
        direction = first.direction(state)
        fz, product = _evaluate(f, z, direction)
        if stopping.measure:
            trace.append(_measure(z, fz, unit_norms, stopping)[1])
        z, state = _step(first, z, product, state)
    z = first.settle(z, state)
    if stopping.measure:
        residual, relative, _ = _measure(z, f(z), unit_norms, stopping)
        trace.append(relative)
    nfe = stopping.max_steps + int(stopping.measure)
    zeros = torch.zeros(z0.shape[0], dtype=torch.int64, device=z0.device)
    return Solution(
        value=z,
        residual=residual,
        relative_residual=relative,
        num_steps=zeros + stopping.max_steps,
        status=zeros + int(Status.COMPLETED),
        nfe=nfe,
        sample_nfe=zeros + nfe,
        trace=torch.stack(trace) if trace else None,
        method=zeros,
        methods=tuple(type(stage).__name__ for stage in solver.stages),
        rejections=first.rejections(state),
        state=state,
    )


def _step(solver: Solver, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One solver step, in the precision of the state: autocast is for the cell."""
    if not torch.is_autocast_enabled(z.device.type):
        return solver.step(z, fz, state)
    with torch.autocast(z.device.type, enabled=False):
        return solver.step(z, fz, state)


def _evaluate(f: Map, z: Tensor, direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """f(z), and J times the direction in the same call of the cell; f(z) again where there is none."""
    if direction is None:
        fz = f(z)
        return fz, fz
    fz, product = torch.func.jvp(f, (z,), (direction,))[:2]
    return fz, product


def _measure(
    z: Tensor, fz: Tensor, unit_norms: UnitNorms | None, rule: Stopping
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, relative residual and whether the tolerance is met, (B,) each, off the tape.

    A sample of several units is as far off as the farthest of them.
    """
    if torch.is_grad_enabled():
        z, fz = z.detach(), fz.detach()
    residual, scale = norms(fz - z, fz) if unit_norms is None else (unit_norms(fz - z), unit_norms(fz))
    # 0 where the residual is 0, the fixed point at the origin included; NaN where both are infinite.
    relative = residual / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    if rule.atol:
        # Infinity is within any tolerance of infinity, hence the test for finiteness.
        met = (residual <= rule.atol + (rule.rtol or 0) * scale) & (residual < torch.inf)
    else:
        met = relative <= (rule.rtol or 0)
    if residual.dim() == 1:
        return residual, relative, met
    return residual.amax(1), relative.amax(1), met.all(1)


@dataclass
class _Progress:
    """What the driver knows of every sample while it iterates; all tensors have the batch first."""

    active: Tensor
    status: Tensor
    num_steps: Tensor  # of finished samples; that of the others is the current step
    sample_nfe: Tensor  # likewise
    best_step: Tensor
    best: Tensor  # (B, D)
    best_residual: Tensor
    best_relative: Tensor
    stage: Tensor  # which method a sample is on
    doubtful: Tensor  # blown up at the last step, which the solver may take back
    # What the host knows without asking the device:
    all_active: bool = True  # nobody is done
    all_improved: bool = False  # everybody did at the last step
    any_doubtful: bool = False  # somebody may be
    improved_at: int | None = None  # the step at which everybody did, if that is later than `best_step`

    @classmethod
    def start(cls, z0: Tensor) -> _Progress:
        """Nothing known."""
        counts = torch.zeros(z0.shape[0], dtype=torch.int64, device=z0.device)
        unknown = z0.new_full((z0.shape[0],), torch.inf)
        return cls(
            active=torch.ones_like(counts, dtype=torch.bool),
            status=torch.full_like(counts, int(Status.MAX_STEPS)),
            num_steps=counts,
            sample_nfe=counts,
            best_step=counts,
            best=z0,
            best_residual=unknown,
            best_relative=unknown,
            stage=counts,
            doubtful=torch.zeros_like(counts, dtype=torch.bool),
        )

    def observe(
        self,
        step: int,
        z: Tensor,
        residual: Tensor,
        relative: Tensor,
        met: Tensor,
        rule: Stopping,
        lenient: bool,
    ) -> None:
        """Keep the better iterates, retire the samples that are done."""
        looking = can_look(z)
        if step == 0:  # a first iterate is the best so far, whatever it is
            self.best, self.best_residual, self.best_relative = z, residual, relative
            self._retire(step, self.active & met, ~(residual < torch.inf), looking)
            return
        improved = residual < self.best_residual  # false for NaN
        # The way of most steps, and the cheapest: nobody is done before this step, everybody got better.
        self.all_improved = looking and self.all_active and bool(improved.all())
        if self.all_improved:
            self.best, self.best_residual, self.best_relative = z, residual, relative
            self.improved_at = step
            if self.any_doubtful:
                self.doubtful, self.any_doubtful = torch.zeros_like(self.doubtful), False
            if not bool(met.any()):
                return
        if self.improved_at is not None:
            self.best_step, self.improved_at = torch.full_like(self.best_step, self.improved_at), None

        active = self.active
        converged = active & met
        # Blow-up is judged before the best is updated.
        unsound = ~((residual <= rule.blowup * self.best_residual) & (residual < torch.inf))
        better = converged | active & improved
        if not self.all_improved and not (looking and not bool(better.any())):
            self.best = torch.where(better.unsqueeze(1), z, self.best)
            self.best_residual = torch.where(better, residual, self.best_residual)
            self.best_relative = torch.where(better, relative, self.best_relative)
            self.best_step = torch.where(better, step, self.best_step)
        diverged = active & unsound
        if lenient:
            diverged, self.doubtful = diverged & self.doubtful, unsound
            self.any_doubtful = True
        stalled = None
        if rule.patience is not None and step >= rule.patience:
            stalled = active & (step - self.best_step >= rule.patience)
        self._retire(step, converged, diverged, looking, stalled)

    def _retire(
        self, step: int, converged: Tensor, diverged: Tensor, looking: bool, stalled: Tensor | None = None
    ) -> None:
        """Samples that are done; a sample that is several of these is the first."""
        finished = converged | diverged if stalled is None else converged | diverged | stalled
        if looking and not bool(finished.any()):
            return
        outcomes = [(Status.DIVERGED, diverged), (Status.CONVERGED, converged)]
        if stalled is not None:
            outcomes.insert(0, (Status.STALLED, stalled))
        for status, which in outcomes:  # the last to be written counts
            self.status = torch.where(which, int(status), self.status)
        self.num_steps = torch.where(finished, step, self.num_steps)
        self.active, self.all_active = self.active & ~finished, False


@dataclass(eq=False)  # a group is itself, whatever its tensors hold
class _Group:
    """Samples that one method works on together."""

    stage: int
    solver: Solver
    state: Any
    rows: Tensor | None  # where they are in the batch that the map sees; None: all of it
    waits: bool = False  # for its samples to be evaluated where it starts

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a batch that are this group's."""
        return tensor if self.rows is None else tensor[self.rows]

    def step(self, z: Tensor, fz: Tensor, product: Tensor) -> Tensor:
        """Their next iterates."""
        image = fz if self.solver.direction(self.state) is None else product
        z_next, self.state = _step(self.solver, self.of(z), self.of(image), self.state)
        return z_next


class _Solve:
    """A solve to a tolerance."""

    def __init__(
        self,
        f: Map,
        z0: Tensor,
        solver: Solver,
        state: Any,
        stopping: Stopping,
        unit_norms: UnitNorms | None,
        compact: Takeable | None,
    ) -> None:
        self.f, self.rule, self.unit_norms, self.compact = f, stopping, unit_norms, compact
        self.solver, self.stages = solver, solver.stages
        self.lenient = any(stage.undoes for stage in self.stages)
        self.groups = [_Group(0, self.stages[0], state, None)]
        self.progress = self.everyone = _Progress.start(z0)
        self.samples: Tensor | None = None  # those that the map sees; None: all
        self.first_state = state  # of the first method, with all samples
        self.rejections: dict[str, Tensor] = {}
        self.trace: list[Tensor] = []
        self.num_active = z0.shape[0]
        self.counted = 0  # evaluations already in `sample_nfe`

    def run(self, z: Tensor) -> Solution:
        """Iterate from `z`."""
        step = 0
        while True:
            fz, product = _evaluate(self.f, z, self._direction(z))
            self._observe(step, z, fz)
            if step == self.rule.max_steps:
                break
            moved = None
            if step % self.rule.check_every == 0:
                moved = self._look(step)
                if self.num_active == 0:
                    break
                z, fz, product, moved = self._drop_finished(step, z, fz, product, moved)
            z = self._advance(z, fz, product)
            del fz, product  # before more memory is asked for
            z = self._hold(z, moved)
            step += 1
        return self._solution(step)

    def _observe(self, step: int, z: Tensor, fz: Tensor) -> None:
        """Take stock of an evaluation."""
        residual, relative, met = _measure(z, fz, self.unit_norms, self.rule)
        self.progress.observe(step, z, residual, relative, met, self.rule, self.lenient)
        if self.samples is not None:
            relative = self.everyone.best_relative.index_copy(0, self.samples, relative)
        self.trace.append(relative)

    def _look(self, step: int) -> Tensor | None:
        """Find out how the samples fare. Waits for the device. Returns which start again at their best."""
        moved = self._hand_on(step) if len(self.stages) > 1 else None
        if moved is None and self.progress.all_active:
            return None
        before, self.num_active = self.num_active, int(self.progress.active.sum())
        if self.num_active < before or moved is not None:
            for group in self.groups:
                group.state = group.solver.freeze(group.state, ~self._owned(group))
        return moved

    def _owned(self, group: _Group) -> Tensor:
        """Which of its samples a group still works on."""
        return group.of(self.progress.active & (self.progress.stage == group.stage))

    def _hand_on(self, step: int) -> Tensor | None:
        """Samples that their method gave up go on with the next one, from their best iterate."""
        known = self.progress
        if known.all_active and known.all_improved:
            return None
        failed = (known.status == Status.STALLED) | (known.status == Status.DIVERGED)
        stuck = known.active & self.solver.gives_up(step - known.best_step)
        moved = (failed | stuck) & (known.stage < len(self.stages) - 1) & (known.best_residual < torch.inf)
        if not bool(moved.any()):
            return None
        known.active = known.active | moved
        known.status = torch.where(moved, int(Status.MAX_STEPS), known.status)
        known.best_step = torch.where(moved, step, known.best_step)
        everyone = torch.arange(len(moved), device=moved.device)
        for group in list(self.groups):
            going = group.of(moved & (known.stage == group.stage)).nonzero().squeeze(1)
            if len(going):
                rows, solver = group.of(everyone)[going], self.stages[group.stage + 1]
                state = solver.adopt(take_samples(group.state, going), known.best[rows])
                self.groups.append(_Group(group.stage + 1, solver, state, rows, waits=True))
        known.stage = known.stage + moved.to(known.stage.dtype)
        for group in [group for group in self.groups if not bool(self._owned(group).any())]:
            self._close(group)
        return moved

    def _drop_finished(
        self, step: int, z: Tensor, fz: Tensor, product: Tensor, moved: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Let finished samples leave the batch that the map sees, if asked and if it pays."""
        if self.compact is None:
            return z, fz, product, moved
        finished = len(z) - self.num_active
        if finished == 0 or finished < _DROP * len(z):
            return z, fz, product, moved
        self._save_progress(step)
        keep = self.progress.active.nonzero().squeeze(1)
        where = torch.full_like(self.progress.stage, -1)
        where[keep] = torch.arange(len(keep), device=z.device)
        for group in self.groups:
            stays = group.of(self.progress.active)
            self._save(group, ~stays)
            group.state = take_samples(group.state, stays.nonzero().squeeze(1))
            if group.rows is not None:
                group.rows = where[group.rows[stays]]
        self.progress = take_samples(self.progress, keep)
        self.progress.all_active = True
        self.samples = keep if self.samples is None else self.samples[keep]
        self.f = self.compact.take(self.samples)
        return z[keep], fz[keep], product[keep], None if moved is None else moved[keep]

    def _save_progress(self, step: int) -> None:
        """Count what the current batch did since the last time, and write it to that of all samples."""
        known = self.progress
        known.sample_nfe = known.sample_nfe + (len(self.trace) - self.counted)
        known.num_steps = torch.where(known.active, step, known.num_steps)
        self.counted = len(self.trace)
        if self.samples is not None:
            self.everyone = put_samples(self.everyone, self.samples, known)

    def _advance(self, z: Tensor, fz: Tensor, product: Tensor) -> Tensor:
        """What the methods make of an evaluation."""
        z_next = z
        for group in self.groups:
            if group.waits:
                group.waits = False
                continue
            stepped = group.step(z, fz, product)
            z_next = stepped if group.rows is None else z_next.index_copy(0, group.rows, stepped)
        return z_next

    def _hold(self, z_next: Tensor, moved: Tensor | None) -> Tensor:
        """The next iterates, with samples that are finished or start again at their best."""
        if moved is None and self.progress.all_active:
            return z_next
        held = ~self.progress.active if moved is None else ~self.progress.active | moved
        return torch.where(held.unsqueeze(1), self.progress.best, z_next)

    def _direction(self, z: Tensor) -> Tensor | None:
        """What the groups want to know J times, zero for those that do not."""
        asked = [(g, d) for g in self.groups if (d := g.solver.direction(g.state)) is not None]
        if not asked:
            return None
        directions = torch.zeros_like(z)
        for group, direction in asked:
            rows = group.rows
            directions = direction if rows is None else directions.index_copy(0, rows, direction)
        return directions

    def _close(self, group: _Group) -> None:
        """A method has no sample left."""
        self._save(group, group.of(torch.ones_like(self.progress.active)))
        self.groups.remove(group)

    def _save(self, group: _Group, leaving: Tensor) -> None:
        """Keep what is known of samples that leave a group: steps refused, state of the first method."""
        here = torch.arange(len(self.progress.active), device=leaving.device)
        samples = group.of(here if self.samples is None else self.samples)
        for cause, counts in group.solver.rejections(group.state).items():
            total = self.rejections.get(cause, torch.zeros_like(self.everyone.num_steps))
            self.rejections[cause] = total.index_add(0, samples[leaving], counts[leaving])
        if group.stage == 0:
            state = group.state
            if self.samples is not None:
                state = put_samples(self.first_state, samples, state)
            self.first_state = state

    def _solution(self, step: int) -> Solution:
        """What was found."""
        for group in list(self.groups):
            self._close(group)
        self._save_progress(step)
        found = self.everyone
        return Solution(
            # A copy: an iterate may be the caller's own tensor, or one that the cell handed out.
            value=found.best.clone(),
            residual=found.best_residual,
            relative_residual=found.best_relative,
            num_steps=found.num_steps,
            status=found.status,
            nfe=len(self.trace),
            sample_nfe=found.sample_nfe,
            trace=torch.stack(self.trace),
            method=found.stage,
            methods=tuple(type(stage).__name__ for stage in self.stages),
            rejections=self.rejections,
            state=self.first_state,
        )

"""A method chosen for every sample by the rate at which its residual falls."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_instance, check_integer
from ..samples import Part, Parts, take_samples
from .anderson import Anderson
from .base import Query, Seen, Solver, anyone, overrides
from .broyden import Broyden
from .newton_krylov import NewtonKrylov
from .picard import Picard

_RECENT = 3  # plain steps that a method learns from: as many as come before the first look
_BLOWUP = 1e6  # residuals beyond the best by this factor are lost
_SLOW = 0.11  # a method that brings log(residual) down by less than that an evaluation is left
_NEAR = 0.01  # a residual below this share of that at the start of a method: it led towards a solution
_LATER = 4  # times the patience with the first method is that with the others


def _default_methods() -> tuple[Solver, ...]:
    return (Anderson(memory=25), Broyden(), NewtonKrylov())


_PLAIN = Picard()


@dataclass(eq=False)
class _Trial:
    """One method at work on some samples, all of which it got at the same evaluation. A step changes it."""

    code: int  # 0: the plain iteration, else the place of the method, counted from 1
    since: int  # the evaluation at which it began
    lowest: Tensor  # (b,), smallest residual then
    start: Tensor | None  # (b, D), the best iterate then
    state: Any  # of the method
    waits: bool = False  # whether its samples are to be evaluated at `start` first
    is_last: bool = False  # whether there is nothing better to try
    is_over: bool = False  # whether all of its samples are finished
    own: Tensor | None = None  # (b,), smallest residual since it began, of methods after the first
    own_at: Tensor | None = None  # (b,), int64, the evaluation that was at

    def fall(self, told: Seen) -> Tensor:
        """How far log(residual) came down an evaluation since it began, (b,)."""
        return (self.lowest.log() - _lowest(told).log()) / max(told.step - self.since, 1)

    def steps_left(self, told: Seen) -> Tensor:
        """Steps to the tolerance at that rate, (b,)."""
        return _steps(told.goal / _lowest(told), -self.fall(told))


@dataclass(eq=False)
class AutoState:
    """Who works on which sample. A step changes it in place."""

    parts: Parts  # of _Trial; a sample is in one of them
    method: Tensor  # (B,), int64, the method of each sample
    falls: Tensor  # (B, methods + 1), how far each method has brought log(residual) down an evaluation
    residuals: tuple[Tensor, ...] = ()  # the last two before this evaluation, (B,) each
    recent: tuple[tuple[Tensor, Tensor], ...] = ()  # iterates and images that a new method may learn from
    step: int | None = None  # the evaluation that was last observed; None: none was
    query: Query | None = None  # what the methods at work ask for


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """The plain iteration where that is fast, and elsewhere the first of several methods that arrives.

    Every sample begins with Picard's iteration. From its last residuals its rate is estimated, with the
    trend carried on, and from the rate the number of steps to the tolerance. A sample that needs more than
    `plain_steps`, or more than are left, goes on with the first of `methods`, which learns from the last
    evaluations too. A method is judged by what it did for a sample since it got it. If the sample's residual
    did not improve for `patience` evaluations, falls by less than a tenth an evaluation, or is predicted not
    to arrive within the steps that are left, the next method goes on: from the sample's best iterate and with
    the history of the one before, if that brought the residual down a hundredfold, else from where that one
    began. (Methods after the first get four times the patience, measured by their own progress.) When none is
    left, the sample goes back to the one that made most progress and stays there. A sample whose residual
    blows up is handed on at once. `Stopping.patience` counts anew when a sample changes method, and does not
    count until a later method has had its time.

    `Solution.method` says who worked on each sample last. Samples change hands when the host looks
    (`Stopping.check_every`); on a CPU, where looking costs nothing, at any step. With a fixed number of steps
    there is no tolerance to predict an arrival at: the first of `methods` takes them all.

    Memory: that of the methods in use, of the samples they work on, and at most 6 states before the first of
    them begins.

    Args:
        methods: in order; the default is Anderson and Broyden with larger memories than their own defaults,
            then Newton-Krylov.
        plain_steps: most steps that a sample is left with the plain iteration for; 0 begins with the first
            of `methods`.
        patience: evaluations without improvement after which the first method is left, at least 1.
    """

    methods: tuple[Solver, ...] = field(default_factory=_default_methods)
    plain_steps: int = 18
    patience: int = 12

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.methods, tuple) or not self.methods:
            raise TypeError(f"Auto: methods must be a tuple of at least one solver, got {self.methods!r}")
        for i, method in enumerate(self.methods):
            hint = "a single method such as deqlib.Anderson()"
            check_instance("Auto", Solver, hint, **{f"methods[{i}]": method})
            if isinstance(method, Auto):
                raise TypeError(f"Auto: methods[{i}] must be {hint}, got {method!r}")
        check_integer("Auto", 0, plain_steps=self.plain_steps)
        check_integer("Auto", 1, patience=self.patience)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the methods, the plain iteration first."""
        return ("Picard", *(type(method).__name__ for method in self.methods))

    def _solver(self, code: int) -> Solver:
        return _PLAIN if code == 0 else self.methods[code - 1]

    def init(self, z0: Tensor) -> AutoState:
        """All samples begin together."""
        batch = z0.shape[0]
        code = 0 if self.plain_steps else 1
        trial = _Trial(code, 0, z0.new_full((batch,), torch.inf), None, self._solver(code).init(z0))
        method = torch.full((batch,), code, dtype=torch.int64, device=z0.device)
        return AutoState(
            parts=Parts((Part(None, trial),)),
            method=method,
            falls=z0.new_full((1, 1), -torch.inf).expand(batch, len(self.methods) + 1),
        )

    def resume(self, state: Any, z0: Tensor) -> AutoState:
        """Samples that a method worked on go on with it and its history; the others begin plainly.

        A history of another solver than `Auto` is the first method's, for all samples.
        """
        if not isinstance(state, AutoState):
            trial = _Trial(1, 0, z0.new_full((len(z0),), torch.inf), None, self.methods[0].resume(state, z0))
            fresh = self.init(z0)
            return replace(fresh, parts=Parts((Part(None, trial),)), method=torch.ones_like(fresh.method))
        if len(state.method) != len(z0):
            raise ValueError(
                f"state: expected the state of a solve of {len(z0)} samples, got one of {len(state.method)}; "
                "leave it out to start afresh"
            )
        fresh, parts = self.init(z0), []
        for part in state.parts.items:
            old, rows = part.state, part.rows
            code = min(old.code, len(self.methods))
            start = z0 if rows is None else z0[rows]
            solver = self._solver(code)
            kept = solver.resume(old.state, start) if code else solver.init(start)
            trial = _Trial(code, 0, start.new_full((len(start),), torch.inf), None, kept)
            parts.append(Part(rows, trial))
        return replace(fresh, parts=Parts(tuple(parts)), method=state.method.clamp_max(len(self.methods)))

    def observe(self, seen: Seen, state: AutoState) -> AutoState:
        """The methods are told what was measured; samples whose method is too slow are handed on."""
        for part in state.parts.items:
            self._tell(part, seen, state)
        state.step = seen.step
        if seen.step == 0:
            seen.assign(self.names, state.method)
        if seen.may_look:
            before = state.method
            for part in state.parts.items:
                if not (part.state.is_over or part.state.is_last):
                    self._judge(part, seen, state)
            if state.method is not before:
                seen.assign(self.names, state.method, state.method != before)
        state.residuals = (*state.residuals[-1:], seen.residual)
        return state

    def _tell(self, part: Part, seen: Seen, state: AutoState) -> None:
        """Tell a part's method what was measured, or that it is over."""
        trial: _Trial = part.state
        solver, told = self._solver(trial.code), _of(part, seen)
        if part.rows is not None and told.finished is not None and not anyone(~told.finished):
            trial.is_over = True
            return
        trial.state = _observed(solver, told, trial.state)
        if told.step == 0:
            trial.lowest = told.residual
        if trial.code > 1:
            self._follow(part, told, seen, state)

    def _follow(self, part: Part, told: Seen, seen: Seen, state: AutoState) -> None:
        """What a later method achieved by itself: it may begin far above the best that was seen before.

        Until it has had its time, `Stopping.patience` does not count.
        """
        trial: _Trial = part.state
        if trial.own is None or trial.own_at is None:
            trial.own, trial.own_at = told.residual, torch.full_like(_rows(part, state.method), told.step)
            return
        progress = told.residual < trial.own
        trial.own = torch.fmin(trial.own, told.residual)
        trial.own_at = torch.where(progress, told.step, trial.own_at)
        if not trial.is_last:
            new = torch.zeros_like(state.method, dtype=torch.bool)
            seen.assign(self.names, state.method, new.index_fill(0, _rows(part, state.method), True))

    def _judge(self, part: Part, seen: Seen, state: AutoState) -> None:
        """Samples of a part whose residual blew up, or whose method is too slow, are handed on."""
        is_look = self._is_look(part.state, seen.step)
        if not is_look and (seen.all_improved or not seen.step):
            return
        told = _of(part, seen)
        at_work = told.before > -torch.inf
        lost = slow = None
        if not seen.all_improved:
            lost = at_work & ~(told.residual <= _BLOWUP * told.before)
            lost = lost if bool(lost.any()) else None
        if is_look:
            slow = at_work & self._is_slow(part, told, state)
            slow = slow if told.finished is None else slow & ~told.finished
            slow = slow if lost is None else slow & ~lost
            slow = slow if bool(slow.any()) else None
        if lost is not None or slow is not None:
            self._hand_on(part, slow, lost, seen, state)

    def _is_slow(self, part: Part, told: Seen, state: AutoState) -> Tensor:
        """Whose method is predicted to take too long, bool (b,)."""
        trial: _Trial = part.state
        if trial.code == 0:
            return self._plain_steps_left(part, told, state) > min(self.plain_steps, told.steps_left)
        since: Tensor = told.since if trial.own_at is None else told.step - trial.own_at
        slow = since >= self._patience(trial)
        if trial.code > 1 or told.step - trial.since < 1.5 * self.patience:
            return slow
        slow = slow | (trial.fall(told) < _SLOW)
        return slow | (trial.steps_left(told) > told.steps_left)

    def _is_look(self, trial: _Trial, step: int) -> bool:
        """Whether a method is judged at this step: the plain iteration at 3, 9, 13, 18, 30, 42, ..."""
        if trial.code == 0:
            return step in (3, 9, 13) or (step > 13 and step % 12 == 6)
        age, patience = step - trial.since, self._patience(trial)
        return age >= patience and age % max(patience // 2, 1) == 0

    def _patience(self, trial: _Trial) -> int:
        """A later method gets more time: it starts where an earlier one got stuck."""
        return self.patience * (1 if trial.code == 1 else _LATER)

    def _plain_steps_left(self, part: Part, told: Seen, state: AutoState) -> Tensor:
        """Steps to the tolerance by the plain iteration, (b,); infinite where it does not get there."""
        older, old = (r if part.rows is None else r[part.rows] for r in state.residuals)
        first, second = old / older, told.residual / old
        # Rates rise as the fast parts of the error die away: half of the last rise is added. Where residuals
        # fall and rise by turns, two steps together say how fast they fall.
        rate = torch.maximum(second * (second / first).clamp_min(1).sqrt(), (first * second).sqrt())
        return _steps(told.goal / told.residual, rate.log())

    def _hand_on(
        self, part: Part, slow: Tensor | None, lost: Tensor | None, seen: Seen, state: AutoState
    ) -> None:
        """Some samples of a part, bool (b,), go on with other methods."""
        trial: _Trial = part.state
        told, rows = _of(part, seen), _rows(part, state.method)
        falls, method = state.falls, state.method
        if trial.code:
            column = torch.full_like(rows, trial.code)
            falls = falls.index_put((rows, column), trial.fall(told))
        parts = [other for other in state.parts.items if other is not part]
        stays = torch.ones_like(told.residual, dtype=torch.bool)
        # A method that got stuck far from a solution may have led astray.
        is_near = _lowest(told) <= _NEAR * trial.lowest
        moves = [(slow, True), (lost, False)] if trial.code == 0 else _split(slow, lost, is_near)
        for which, goes_on in moves:
            if which is None:
                continue
            stays = stays & ~which
            for code, goes in self._followers(trial.code, which.nonzero().squeeze(1), falls[rows]):
                following = part if len(goes) == len(rows) else _cut(part, goes)
                parts.append(self._begin(code, following, _of(following, seen), state, goes_on))
                method = method.index_fill(0, rows[goes], code)
        if bool(stays.any()):
            parts.append(_cut(part, stays.nonzero().squeeze(1)))
        state.parts, state.method, state.falls = Parts(tuple(parts)), method, falls

    def _followers(self, code: int, goes: Tensor, falls: Tensor) -> list[tuple[int, Tensor]]:
        """The methods that go on with samples (places in a part) which one gave up."""
        if code < len(self.methods):
            return [(code + 1, goes)]
        # All were tried: back to the one that made most progress.
        chosen = falls[goes].argmax(1).clamp_min(1)
        return [(code, goes[chosen == code]) for code in sorted(set(chosen.tolist()))]

    def _begin(self, code: int, part: Part, told: Seen, state: AutoState, goes_on: bool) -> Part:
        """A method starts on the samples of a part: with what the one before learnt, or afresh."""
        trial: _Trial = part.state
        solver, rows, best = self._solver(code), part.rows, told.best
        is_last = trial.code == len(self.methods)
        new = _Trial(code, told.step, _lowest(told), best, None, is_last=is_last)
        if trial.code == 0 and goes_on:
            # It learns from the last plain steps, and goes on from where they led.
            recent = [(z, fz) if rows is None else (z[rows], fz[rows]) for z, fz in state.recent]
            inner = solver.init(recent[0][0] if recent else best)
            for z, fz in recent:
                inner = solver.step(z, fz, inner)[1]
            return Part(rows, replace(new, state=_observed(solver, told, inner)))
        if not goes_on:
            start = best if trial.start is None else trial.start
            return Part(rows, replace(new, start=start, state=solver.init(start), waits=True))
        try:
            inner = solver.resume(trial.state, best)
        except ValueError:  # it cannot learn from that method
            inner = solver.init(best)
        return Part(rows, replace(new, state=inner, waits=True))

    def step(self, z: Tensor, fz: Tensor, state: AutoState) -> tuple[Tensor, AutoState]:
        """A step of every method on its samples."""
        if state.step is None:  # nothing is measured
            for part in state.parts.items:
                if part.state.code == 0:
                    own = z if part.rows is None else z[part.rows]
                    part.state.code, part.state.state = 1, self.methods[0].init(own)
        z_next = z
        for part in state.parts.items:
            moved = self._step_part(part, z, fz)
            z_next = moved if part.rows is None else z_next.index_copy(0, part.rows, moved)
        state.recent, state.query = self._recent(z, fz, state), None
        if any(overrides(self._solver(part.state.code), "query") for part in state.parts.items):
            state.query = self._query(state.parts.items, z_next)
        return z_next, state

    def _step_part(self, part: Part, z: Tensor, fz: Tensor) -> Tensor:
        """The next iterates of a part's samples."""
        trial: _Trial = part.state
        own, image = (z, fz) if part.rows is None else (z[part.rows], fz[part.rows])
        if trial.is_over:
            return own
        if trial.waits:
            assert trial.start is not None
            trial.waits = False
            return trial.start
        moved, trial.state = self._solver(trial.code).step(own, image, trial.state)
        return moved

    def _recent(self, z: Tensor, fz: Tensor, state: AutoState) -> tuple[tuple[Tensor, Tensor], ...]:
        """The last evaluations while there are plain steps, for a method to learn from."""
        is_plain = state.step is not None and any(part.state.code == 0 for part in state.parts.items)
        return (*state.recent[1 - _RECENT :], (z, fz)) if is_plain else ()

    def _query(self, parts: tuple[Part, ...], z: Tensor) -> Query:
        """What the methods ask for, together."""
        point, direction, wanted = z, None, None
        for part in parts:
            asked = self._solver(part.state.code).query(part.state.state)
            if asked is None:
                continue
            rows = _rows(part, z)
            if asked.point is not None:
                point = point.index_copy(0, rows, asked.point)
            if asked.direction is not None:
                direction = torch.zeros_like(z) if direction is None else direction
                wanted = torch.zeros(len(z), dtype=torch.bool, device=z.device) if wanted is None else wanted
                direction = direction.index_copy(0, rows, asked.direction)
                own = wanted.new_ones(len(rows)) if asked.wanted is None else asked.wanted
                wanted = wanted.index_copy(0, rows, own)
        return Query(point, direction, wanted)

    def query(self, state: AutoState) -> Query | None:
        """What the methods at work ask for."""
        return state.query


def _observed(solver: Solver, told: Seen, state: Any) -> Any:
    """The state of a method that was told what was measured."""
    return solver.observe(told, state) if overrides(solver, "observe") else state


def _of(part: Part, seen: Seen) -> Seen:
    return seen if part.rows is None else seen.of(part.rows)


def _rows(part: Part, tensor: Tensor) -> Tensor:
    """The places of a part's samples in a batch like that of `tensor`."""
    return torch.arange(len(tensor), device=tensor.device) if part.rows is None else part.rows


def _split(slow: Tensor | None, lost: Tensor | None, is_near: Tensor) -> list[tuple[Tensor | None, bool]]:
    """Samples, bool (b,), that go on from their best iterate, and those that begin where the method did."""
    leaving = slow if lost is None else lost if slow is None else slow | lost
    assert leaving is not None
    near, far = leaving & is_near, leaving & ~is_near
    return [(which, is_on) for which, is_on in ((near, True), (far, False)) if bool(which.any())]


def _lowest(told: Seen) -> Tensor:
    """Smallest residual so far, this evaluation included, (B,)."""
    return torch.fmin(told.before, told.residual)


def _steps(share: Tensor, log_rate: Tensor) -> Tensor:
    """Steps in which a residual falls to a share of itself, at that rate a step."""
    steps = share.log() / log_rate
    return torch.where(log_rate < 0, steps, torch.inf)  # a rate that is not a number is none


def _cut(part: Part, which: Tensor) -> Part:
    """A part with these of its samples alone."""
    if part.rows is not None and len(which) == len(part.rows):
        return part
    rows = which if part.rows is None else part.rows[which]
    return Part(rows, take_samples(part.state, which))

"""A method chosen for every sample by the rate at which its residual falls."""

from __future__ import annotations

import contextlib
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
from .secant import SecantSolver

_RECENT = 3  # plain steps that a method learns from: as many as come before the first look
_BLOWUP = 1e6  # residuals beyond the best by this factor are lost
_SLOW = 0.08  # a method that brings log(residual) down by less than that an evaluation is slow
_NEAR = 0.01  # a residual below this share of that at the start of a method: it led towards a solution
_LATER = 4  # times the patience with the first method is that with the others


def _default_methods() -> tuple[Solver, ...]:
    return (Anderson(memory=25, budget=2**18), Broyden(), NewtonKrylov())


@dataclass(eq=False)
class _Trial:
    """One method at work on some samples, all of which it got at the same evaluation. A step changes it."""

    code: int  # the place of the method, counted from 1
    since: int  # the evaluation at which it began
    lowest: Tensor  # (b,), smallest residual then
    state: Any  # of the method
    start: Tensor | None = None  # (b, D), where its samples are to be evaluated first; None: where they are
    is_last: bool = False  # whether there is nothing better to try
    is_over: bool = False  # whether all of its samples are finished
    own: Tensor | None = None  # (b,), smallest residual since it began, of methods after the first
    own_at: Tensor | None = None  # (b,), int64, the evaluation that was at


@dataclass(eq=False)
class _Lead:
    """A secant method at work on samples that got it at different evaluations. A step changes it.

    Its state is of all samples, so that no others need to be cut out: it sees what those do, which makes
    columns like any other, and what it proposes for them is left.
    """

    led: Tensor  # (B,), bool, the samples that it works on
    since: Tensor  # (B,), int64, the evaluation at which it got each
    begun: tuple[int, ...]  # all that are in `since`
    lowest: Tensor  # (B,), smallest residual then
    state: Any  # of the method
    finished: Tensor | None = None  # (B,), bool, as of the evaluation before; None: nobody
    is_over: bool = False  # whether all of its samples are finished


@dataclass(eq=False)
class AutoState:
    """Who works on which sample. A step changes it in place."""

    origin: Tensor  # (B, D), where the solve began
    method: Tensor  # (B,), int64, the method of each sample
    falls: Tensor  # (B, methods + 1), how far each method has brought log(residual) down an evaluation
    has_plain: bool  # whether there may be samples that are left with the plain iteration
    parts: Parts  # of _Trial; samples that are neither plain nor led are in one of them each
    lead: _Lead | None = None  # the first method, if that is a secant method
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
    did not improve for `patience` evaluations, falls by less than 8 % an evaluation while more than half
    of the evaluations that it took are still to go, or is predicted not to arrive within the steps that are
    left, the next method goes on: from the sample's best iterate and with the history of the one before, if
    that brought the residual down a hundredfold and has not got stuck, else from where the solve began, as if
    it were the first. (Methods after the first get four times the patience, measured by their own progress.)
    When none is left, the sample goes back to the one that made most progress and stays there. A sample whose
    residual blows up is handed on at once. `Stopping.patience` counts anew when a sample changes method, and
    does not count until a later method has had its time.

    `Solution.method` says who worked on each sample last. Samples change hands when the host looks
    (`Stopping.check_every`); on a CPU, where looking costs nothing, at any step. With a fixed number of steps
    there is no tolerance to predict an arrival at: the first of `methods` takes them all.

    Memory: that of the methods in use, and at most 7 states before the first of them begins. A secant method
    that comes first keeps a history of the whole batch as soon as one sample needs it, the others of the
    samples that they work on.

    Args:
        methods: in order; the default is Anderson with a larger memory than its own default, Broyden, and
            Newton-Krylov.
        plain_steps: most steps that a sample is left with the plain iteration for; 0 begins with the first
            of `methods`.
        patience: evaluations without improvement after which the first method is left, at least 1.
    """

    methods: tuple[Solver, ...] = field(default_factory=_default_methods)
    plain_steps: int = 18
    patience: int = 12

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.methods, tuple):
            raise TypeError(f"Auto: methods must be a tuple of solvers, got {self.methods!r}")
        if not self.methods:
            raise ValueError("Auto: methods must hold at least one solver, got ()")
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

    def init(self, z0: Tensor) -> AutoState:
        """All samples begin together."""
        state = self._fresh(z0)
        return state if state.has_plain else self._all_by_the_first(self.methods[0].init(z0), z0)

    def _fresh(self, z0: Tensor) -> AutoState:
        batch = z0.shape[0]
        return AutoState(
            origin=z0,
            method=torch.zeros(batch, dtype=torch.int64, device=z0.device),
            falls=z0.new_full((1, 1), -torch.inf).expand(batch, len(self.methods) + 1),
            has_plain=self.plain_steps > 0,
            parts=Parts(()),
        )

    def _all_by_the_first(self, state: Any, z0: Tensor) -> AutoState:
        """All samples begin with the first method and a state of it."""
        fresh, trial = self._fresh(z0), _Trial(1, 0, z0.new_full((len(z0),), torch.inf), state)
        method = torch.ones_like(fresh.method)
        return replace(fresh, method=method, has_plain=False, parts=Parts((Part(None, trial),)))

    def resume(self, state: Any, z0: Tensor) -> AutoState:
        """Samples that a method worked on go on with it and its history; the others begin plainly, and so do
        those of a first method that keeps nothing.

        A history of another solver than `Auto` is the first method's, for all samples.
        """
        if not isinstance(state, AutoState):
            return self._all_by_the_first(self.methods[0].resume(state, z0), z0)
        if len(state.method) != len(z0):
            raise ValueError(
                f"state: expected the state of a solve of {len(z0)} samples, got one of {len(state.method)}; "
                "leave it out to start afresh"
            )
        fresh, old, parts = self._fresh(z0), list(state.parts.items), []
        if state.lead is not None:
            led = Part(None, _Trial(1, 0, state.lead.lowest, state.lead.state))
            rows = state.lead.led.nonzero().squeeze(1)
            old.append(led if rows.shape[0] == z0.shape[0] else _cut(led, rows))
        method = fresh.method
        for part in old:
            code, rows = min(part.state.code, len(self.methods)), _rows(part, z0)
            if code == 1 and self.plain_steps and not overrides(self.methods[0], "resume"):
                continue  # it remembers nothing, so what comes before it is not left out
            method, start = method.index_fill(0, rows, code), z0[rows]
            known = self.methods[code - 1].resume(part.state.state, start)
            unknown = start.new_full((len(start),), torch.inf)
            parts.append(Part(part.rows, _Trial(code, 0, unknown, known)))
        return replace(fresh, parts=Parts(tuple(parts)), method=method, has_plain=anyone(method == 0))

    def observe(self, seen: Seen, state: AutoState) -> AutoState:
        """The methods are told what was measured; samples whose method is too slow are handed on."""
        state.step, before, parts = seen.step, state.method, state.parts.items
        if seen.step == 0:
            seen.assign(self.names, state.method)
        for part in parts:
            self._tell(part, seen, state)
        if seen.may_look and state.has_plain:
            self._judge_plain(seen, state)
        lead = state.lead
        if lead is not None and lead.finished is not seen.finished:
            lead.finished = seen.finished
            lead.is_over = not anyone(_without(lead.led, seen.finished))
        if lead is not None and not lead.is_over:
            lead.state = self.methods[0].observe(seen, lead.state)
        if seen.may_look:
            if lead is not None and not lead.is_over:
                self._judge_led(lead, seen, state)
            for part in parts:
                if not (part.state.is_over or part.state.is_last):
                    self._judge(part, seen, state)
            if state.method is not before:
                seen.assign(self.names, state.method, state.method != before)
        state.residuals = (*state.residuals[-1:], seen.residual)
        return state

    def _tell(self, part: Part, seen: Seen, state: AutoState) -> None:
        """Tell a part's method what was measured, or that it is over."""
        trial: _Trial = part.state
        told = _of(part, seen)
        if part.rows is not None and told.finished is not None and not anyone(~told.finished):
            trial.is_over = True
            return
        trial.state = _observed(self.methods[trial.code - 1], told, trial.state)
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

    def _judge_plain(self, seen: Seen, state: AutoState) -> None:
        """Samples that the plain iteration throws out, or is too slow for, are handed to the first method.

        It is judged at the evaluations 3, 9, 13, 18, 30, 42, ...
        """
        step = seen.step
        is_look = step in (3, 9, 13) or (step > 13 and step % 12 == 6)
        if not is_look and (seen.all_improved or not step):
            return
        at_work = (state.method == 0) & (seen.before > -torch.inf)
        lost, slow = _blown_up(seen, at_work), None
        if is_look:
            slow = at_work & (_plain_steps_left(seen, state) > min(self.plain_steps, seen.steps_left))
            slow = _some(slow, seen.finished, lost)
        if lost is not None:
            rows = lost.nonzero().squeeze(1)
            state.parts = state.parts.with_part(self._begin(1, rows, None, seen, state))
        if slow is not None:
            self._join(slow, seen, state)
        if lost is not None or slow is not None:
            state.has_plain = anyone(state.method == 0)

    def _join(self, slow: Tensor, seen: Seen, state: AutoState) -> None:
        """Samples of the plain iteration, bool (B,), go on with the first method, which learns from it."""
        first, rows = self.methods[0], slow.nonzero().squeeze(1)
        state.method = state.method.index_fill(0, rows, 1)
        if isinstance(first, SecantSolver):
            self._lead(first, slow, seen, state)
            return
        known = first.init(state.recent[0][0][rows])
        for z, fz in state.recent:
            known = first.step(z[rows], fz[rows], known)[1]
        told = seen.of(rows)
        trial = _Trial(1, seen.step, _lowest(told), _observed(first, told, known))
        state.parts = state.parts.with_part(Part(rows, trial))

    def _lead(self, first: SecantSolver, slow: Tensor, seen: Seen, state: AutoState) -> None:
        """A secant method learns from all samples, and leads these."""
        lead = state.lead
        if lead is None:
            nobody, known = torch.zeros_like(slow), first.init(state.recent[0][0])
            lead = _Lead(nobody, torch.zeros_like(state.method), (), seen.before, known, is_over=True)
        if lead.is_over:
            first.catch_up(lead.state, state.recent, seen.finished)
        first.lead(lead.state, slow, seen.before, seen.step)
        state.lead = _Lead(
            lead.led | slow,
            torch.where(slow, seen.step, lead.since),
            (*lead.begun, seen.step),
            torch.where(slow, _lowest(seen), lead.lowest),
            lead.state,
            seen.finished,
        )

    def _judge_led(self, lead: _Lead, seen: Seen, state: AutoState) -> None:
        """Samples that the first method, a secant method, is too slow for are handed on."""
        looked_at = [since for since in lead.begun if self._is_look(1, seen.step - since)]
        if seen.all_improved and not looked_at:
            return
        slow = None
        for since in looked_at:
            found = self._is_slow(seen, lead.lowest, seen.step - since, seen.since)
            found = found if len(lead.begun) == 1 else found & (lead.since == since)
            slow = found if slow is None else slow | found
        leaving = _leaving(seen, lead.led & (seen.before > -torch.inf), slow)
        if leaving is None:
            return
        rows = leaving.nonzero().squeeze(1)
        trial = _Trial(1, 0, lead.lowest[rows], take_samples(lead.state, rows))
        self._hand_on(Part(rows, trial), seen.step - lead.since[rows], seen, state)
        lead.led = lead.led & ~leaving
        lead.state.let_go(leaving)
        lead.is_over = not anyone(_without(lead.led, seen.finished))

    def _judge(self, part: Part, seen: Seen, state: AutoState) -> None:
        """Samples of a part whose residual blew up, or whose method is too slow, are handed on."""
        trial: _Trial = part.state
        age = seen.step - trial.since
        is_look = self._is_look(trial.code, age)
        if not is_look and (seen.all_improved or not seen.step):
            return
        told = _of(part, seen)
        slow = None
        if is_look:
            slow = self._is_slow(told, trial.lowest, age, _stuck(trial, told), trial.code)
        leaving = _leaving(told, told.before > -torch.inf, slow)
        if leaving is None:
            return
        state.parts = Parts(tuple(other for other in state.parts.items if other is not part))
        stays = ~leaving
        if bool(stays.any()):
            state.parts = state.parts.with_part(_cut(part, stays.nonzero().squeeze(1)))
            part = _cut(part, leaving.nonzero().squeeze(1))
        self._hand_on(part, torch.full_like(_rows(part, state.method), age), seen, state)

    def _is_slow(self, told: Seen, lowest: Tensor, age: int, stuck: Tensor, code: int = 1) -> Tensor:
        """Whose method is predicted to take too long, bool (b,).

        Args:
            told: what was measured.
            lowest: smallest residual when the method began, (b,).
            age: evaluations since then.
            stuck: evaluations since the last progress, (b,).
            code: the method.
        """
        is_stuck = stuck >= self._patience(code)
        if code > 1 or age < 1.5 * self.patience:
            return is_stuck
        now = _lowest(told)
        gone, left = (lowest / now).log(), (now / told.goal).log()
        has_more_to_go = 2 * left > gone
        is_late = left * age > gone * told.steps_left
        return is_stuck | (gone < _SLOW * age) & has_more_to_go | is_late

    def _is_look(self, code: int, age: int) -> bool:
        """Whether a method is judged after so many evaluations."""
        patience = self._patience(code)
        return age >= patience and age % max(patience // 2, 1) == 0

    def _patience(self, code: int) -> int:
        """A later method gets more time: it starts where an earlier one got stuck."""
        return self.patience * (1 if code == 1 else _LATER)

    def _hand_on(self, part: Part, age: Tensor, seen: Seen, state: AutoState) -> None:
        """The samples of a part, which is none of those in the state any more, go on with other methods.

        Args:
            part: a `_Trial`.
            age: evaluations since its method got each, int64, (b,).
            seen: what was measured, of all samples.
            state: to change.
        """
        trial: _Trial = part.state
        told, rows = _of(part, seen), _rows(part, state.method)
        fall = (trial.lowest / _lowest(told)).log() / age.clamp_min(1)
        state.falls = state.falls.index_put((rows, torch.full_like(rows, trial.code)), fall)
        # A method that got stuck, or did not get far, may have led astray.
        is_stuck = _stuck(trial, told) >= self._patience(trial.code)
        is_near = (_lowest(told) <= _NEAR * trial.lowest) & ~is_stuck
        for which, goes_on in ((is_near, True), (~is_near, False)):
            if not bool(which.any()):
                continue
            places = which.nonzero().squeeze(1)
            for code, goes in self._followers(trial.code, places, state.falls[rows]):
                cut = part if len(goes) == len(rows) else _cut(part, goes)
                state.parts = state.parts.with_part(
                    self._begin(code, rows[goes], cut.state, seen, state, goes_on)
                )

    def _followers(self, code: int, goes: Tensor, falls: Tensor) -> list[tuple[int, Tensor]]:
        """The methods that go on with samples (places in a part) which one gave up."""
        if code < len(self.methods):
            return [(code + 1, goes)]
        # All were tried: back to the one that made most progress.
        chosen = falls[goes].argmax(1).clamp_min(1)
        return [(code, goes[chosen == code]) for code in sorted(set(chosen.tolist()))]

    def _begin(
        self,
        code: int,
        rows: Tensor,
        trial: _Trial | None,
        seen: Seen,
        state: AutoState,
        goes_on: bool = False,
    ) -> Part:
        """A method starts on some samples: at their best iterates, with what the one before learnt if that
        led there; or where the solve began, as if it were the first.
        """
        solver, told = self.methods[code - 1], seen.of(rows)
        state.method = state.method.index_fill(0, rows, code)
        start = told.best if goes_on or trial is None else state.origin[rows]
        is_last = trial is not None and trial.code == len(self.methods)
        known = None
        if trial is not None and goes_on:
            with contextlib.suppress(ValueError):  # it cannot learn from that method
                known = solver.resume(trial.state, start)
        known = solver.init(start) if known is None else known
        return Part(rows, _Trial(code, told.step, _lowest(told), known, start, is_last=is_last))

    def step(self, z: Tensor, fz: Tensor, state: AutoState) -> tuple[Tensor, AutoState]:
        """A step of every method on its samples."""
        if state.step is None and state.has_plain:  # nothing is measured
            state = self._all_accelerated(z, state)
        z_next, lead = fz, state.lead
        if lead is not None and not lead.is_over:
            moved, lead.state = self.methods[0].step(z, fz, lead.state)
            z_next = torch.where(lead.led.unsqueeze(1), moved, fz) if state.has_plain else moved
        for part in state.parts.items:
            moved = self._step_part(part, z, fz)
            z_next = moved if part.rows is None else z_next.index_copy(0, part.rows, moved)
        state.recent = (*state.recent[1 - _RECENT :], (z, fz)) if state.has_plain else ()
        state.query = None
        if any(overrides(self.methods[part.state.code - 1], "query") for part in state.parts.items):
            state.query = self._query(state.parts.items, z_next)
        return z_next, state

    def _all_accelerated(self, z: Tensor, state: AutoState) -> AutoState:
        """Samples without a method get the first one."""
        if not state.parts.items:
            return self._all_by_the_first(self.methods[0].init(z), z)
        rows = (state.method == 0).nonzero().squeeze(1)
        own = self._all_by_the_first(self.methods[0].init(z[rows]), z[rows]).parts.items[0].state
        method = state.method.clamp_min(1)
        return replace(state, method=method, has_plain=False, parts=state.parts.with_part(Part(rows, own)))

    def _step_part(self, part: Part, z: Tensor, fz: Tensor) -> Tensor:
        """The next iterates of a part's samples."""
        trial: _Trial = part.state
        own, image = (z, fz) if part.rows is None else (z[part.rows], fz[part.rows])
        if trial.is_over:
            return own
        if trial.start is not None:
            start, trial.start = trial.start, None
            return start
        moved, trial.state = self.methods[trial.code - 1].step(own, image, trial.state)
        return moved

    def _query(self, parts: tuple[Part, ...], z: Tensor) -> Query:
        """What the methods ask for, together."""
        point, direction, wanted = z, None, None
        for part in parts:
            asked = self.methods[part.state.code - 1].query(part.state.state)
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


def _plain_steps_left(seen: Seen, state: AutoState) -> Tensor:
    """Steps to the tolerance by the plain iteration, (B,); infinite where it does not get there."""
    older, old = state.residuals
    first, second = old / older, seen.residual / old
    # Rates rise as the fast parts of the error die away: half of the last rise is added. Where residuals
    # fall and rise by turns, two steps together say how fast they fall.
    rate = torch.maximum(second * (second / first).clamp_min(1).sqrt(), (first * second).sqrt())
    return _steps(seen.goal / seen.residual, rate.log())


def _blown_up(told: Seen, at_work: Tensor) -> Tensor | None:
    """The samples among those at work whose residual is lost, bool (b,); `None`: nobody."""
    if told.all_improved:
        return None
    return _some(at_work & ~(told.residual <= _BLOWUP * told.before))


def _leaving(told: Seen, at_work: Tensor, slow: Tensor | None) -> Tensor | None:
    """The samples among those at work that are lost or slow, bool (b,); `None`: nobody."""
    lost, slow = _blown_up(told, at_work), None if slow is None else _some(at_work & slow, told.finished)
    return lost if slow is None else slow if lost is None else slow | lost


def _without(which: Tensor, others: Tensor | None) -> Tensor:
    """Samples, bool (b,), without some; `None`: without nobody."""
    return which if others is None else which & ~others


def _some(which: Tensor, *exempt: Tensor | None) -> Tensor | None:
    """Samples, bool (b,), without those that are exempt; `None`: nobody."""
    for others in exempt:
        which = _without(which, others)
    return which if bool(which.any()) else None


def _stuck(trial: _Trial, told: Seen) -> Tensor:
    """Evaluations since the last progress: of a later method, its own, int64, (b,)."""
    return told.since if trial.own_at is None else told.step - trial.own_at


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

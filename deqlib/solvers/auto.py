"""A method chosen for every sample by the rate at which its residual falls."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_instance, check_integer, settle_numbers
from ..samples import Part, Parts
from . import rates
from .anderson import Anderson
from .base import Query, Seen, Solver, anyone, overrides
from .broyden import Broyden
from .newton_krylov import NewtonKrylov
from .secant import SecantSolver
from .trials import AutoState, Lead, Trial, ask, cut, grouped, move, observed, rows_of, seen_by

_RECENT = 3  # plain steps that a method learns from: as many as come before the first look
_LATER = 4  # times the patience with the first method is that with the others


def _default_methods() -> tuple[Solver, ...]:
    return (Anderson(memory=25, budget=2**18), Broyden(), NewtonKrylov())


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
    residual blows up, as `Stopping.blowup` says, is handed on at once. `Stopping.patience` counts anew when a
    sample changes method, and does not count until a later method has had its time.

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
        settle_numbers(self)
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
        """All samples begin with the plain iteration, if there are to be any steps of it."""
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
        fresh, trial = self._fresh(z0), Trial(1, 0, z0.new_full((len(z0),), torch.inf), state)
        method = torch.ones_like(fresh.method)
        return replace(fresh, method=method, has_plain=False, parts=Parts((Part(None, trial),)))

    def resume(self, state: Any, z0: Tensor) -> AutoState:
        """Samples that a method worked on go on with it and its history; the others begin plainly, and so do
        those of a first method that keeps nothing.

        A history of another solver than `Auto` is the first method's, for all samples.

        Raises:
            ValueError: `state` is of another batch, or one of the methods cannot go on with it.
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
            led = Part(None, Trial(1, 0, state.lead.lowest, state.lead.state))
            rows = state.lead.led.nonzero().squeeze(1)
            old.append(led if rows.shape[0] == z0.shape[0] else cut(led, rows))
        method = fresh.method
        for part in old:
            code, rows = min(part.state.code, len(self.methods)), rows_of(part, z0)
            if code == 1 and self.plain_steps and not overrides(self.methods[0], "resume"):
                continue  # it remembers nothing, so the plain iteration comes first again
            method, start = method.index_fill(0, rows, code), z0[rows]
            known = self.methods[code - 1].resume(part.state.state, start)
            unknown = start.new_full((len(start),), torch.inf)
            parts.append(Part(part.rows, Trial(code, 0, unknown, known)))
        return replace(fresh, parts=Parts(tuple(parts)), method=method, has_plain=anyone(method == 0))

    # Told what was measured ------------------------------------------------------------------------------

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
        if lead is not None:
            lead.freeze(seen.finished)
        if lead is not None and not lead.is_over:
            lead.state = observed(self.methods[0], seen, lead.state)
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
        trial: Trial = part.state
        told = seen_by(part, seen)
        if part.rows is not None and told.finished is not None and not anyone(~told.finished):
            trial.is_over = True
            return
        trial.state = observed(self.methods[trial.code - 1], told, trial.state)
        if told.step == 0:
            trial.lowest = told.residual
        if trial.code > 1:
            self._follow(part, told, seen, state)

    def _follow(self, part: Part, told: Seen, seen: Seen, state: AutoState) -> None:
        """Record what a later method achieves by itself: it may begin far above the best residual so far.

        While it may still be judged, `Stopping.patience` begins anew at every evaluation.
        """
        trial: Trial = part.state
        if trial.own is None or trial.own_at is None:
            trial.own, trial.own_at = told.residual, torch.full_like(rows_of(part, state.method), told.step)
            return
        progress = told.residual < trial.own
        trial.own = torch.fmin(trial.own, told.residual)
        trial.own_at = torch.where(progress, told.step, trial.own_at)
        if not trial.is_last:
            new = torch.zeros_like(state.method, dtype=torch.bool)
            seen.assign(self.names, state.method, new.index_fill(0, rows_of(part, state.method), True))

    # Which samples a method is not for -------------------------------------------------------------------

    def _judge_plain(self, seen: Seen, state: AutoState) -> None:
        """Samples that the plain iteration throws out, or is too slow for, are handed to the first method.

        It is judged at the evaluations 3, 9, 13, 18, 30, 42, ...
        """
        step = seen.step
        is_look = step in (3, 9, 13) or (step > 13 and step % 12 == 6)
        if not is_look and (seen.all_improved or not step):
            return
        at_work, slow = (state.method == 0) & (seen.before > -torch.inf), None
        lost = rates.blown_up(seen)
        lost = None if lost is None else _some(at_work & lost)
        if is_look:
            left = rates.plain_steps_left(seen, *state.residuals)
            slow = at_work & (left > min(self.plain_steps, seen.steps_left))
            slow = _some(_without(_without(slow, seen.finished), lost))
        if lost is not None:
            self._begin(1, lost.nonzero().squeeze(1), None, seen, state)
        if slow is not None:
            self._join(slow, seen, state)
        if lost is not None or slow is not None:
            state.has_plain = anyone(state.method == 0)

    def _judge_led(self, lead: Lead, seen: Seen, state: AutoState) -> None:
        """Samples that are led, and that this is too slow for, are handed on."""
        looked_at = [since for since in lead.begun if self._is_look(1, seen.step - since)]
        if seen.all_improved and not looked_at:
            return
        slow = None
        for since in looked_at:
            found = self._is_slow(seen, lead.lowest, seen.step - since, seen.since)
            found = found if len(lead.begun) == 1 else found & (lead.since == since)
            slow = found if slow is None else slow | found
        leaving = _leaving(seen, lead.led & (seen.before > -torch.inf), slow)
        if leaving is not None:
            led = Part(None, Trial(1, 0, lead.lowest, lead.state))
            self._hand_on(led, leaving, seen.step - lead.since, seen, state)
            lead.let_go(leaving)

    def _judge(self, part: Part, seen: Seen, state: AutoState) -> None:
        """Samples of a part whose residual blew up, or whose method is too slow, are handed on."""
        trial: Trial = part.state
        age = seen.step - trial.since
        is_look = self._is_look(trial.code, age)
        if not is_look and (seen.all_improved or not seen.step):
            return
        told, slow = seen_by(part, seen), None
        if is_look:
            slow = self._is_slow(told, trial.lowest, age, trial.stuck(told), trial.code)
        leaving = _leaving(told, told.before > -torch.inf, slow)
        if leaving is not None:
            state.parts = state.parts.without_part(part)
            stays = self._hand_on(part, leaving, torch.full_like(told.since, age), seen, state)
            if len(stays):
                state.parts = state.parts.with_part(cut(part, stays))

    def _is_slow(self, told: Seen, start: Tensor, age: int, stuck: Tensor, code: int = 1) -> Tensor:
        """Whose method is stuck or predicted to take too long, bool (b,).

        Args:
            told: what was measured.
            start: smallest residual when the method began, (b,).
            age: evaluations since then.
            stuck: evaluations since the last progress, (b,).
            code: the method.
        """
        is_stuck = stuck >= self._patience(code)
        if code > 1 or age < 1.5 * self.patience:
            return is_stuck
        return is_stuck | rates.is_slow(told, start, age)

    def _is_look(self, code: int, age: int) -> bool:
        """Whether a method is judged after so many evaluations."""
        patience = self._patience(code)
        return age >= patience and age % max(patience // 2, 1) == 0

    def _patience(self, code: int) -> int:
        """A later method gets more time: it starts where an earlier one got stuck."""
        return self.patience * (1 if code == 1 else _LATER)

    # Who goes on with them -------------------------------------------------------------------------------

    def _join(self, slow: Tensor, seen: Seen, state: AutoState) -> None:
        """Samples of the plain iteration, bool (B,), go on with the first method, which learns from it."""
        first, rows = self.methods[0], slow.nonzero().squeeze(1)
        state.method = state.method.index_fill(0, rows, 1)
        if isinstance(first, SecantSolver):
            state.lead = self._led(first, slow, seen, state)
            return
        known = first.init(state.recent[0][0][rows])
        for z, fz in state.recent:
            known = first.step(z[rows], fz[rows], known)[1]
        told = seen.of(rows)
        trial = Trial(1, seen.step, rates.lowest(told), observed(first, told, known))
        state.parts = state.parts.with_part(Part(rows, trial))

    def _led(self, first: SecantSolver, slow: Tensor, seen: Seen, state: AutoState) -> Lead:
        """A secant method leads these samples, bool (B,), from now on; it learns from the whole batch."""
        lead = state.lead
        if lead is None:
            nobody, known = torch.zeros_like(slow), first.init(state.recent[0][0])
            lead = Lead(nobody, torch.zeros_like(state.method), (), seen.before, known, is_over=True)
        if lead.is_over:
            first.catch_up(lead.state, state.recent, seen.finished)
        first.take_over(lead.state, slow, seen.before, seen.step)
        return Lead(
            led=lead.led | slow,
            since=torch.where(slow, seen.step, lead.since),
            begun=(*lead.begun, seen.step),
            lowest=torch.where(slow, rates.lowest(seen), lead.lowest),
            state=lead.state,
            finished=seen.finished,
        )

    def _hand_on(self, part: Part, leaving: Tensor, age: Tensor, seen: Seen, state: AutoState) -> Tensor:
        """Samples of a part go on with other methods; returns the places in the part of those that stay.

        Args:
            part: of a `Trial`.
            leaving: the samples, bool, (b,).
            age: evaluations since the method got each, int64, (b,).
            seen: what was measured, of all samples.
            state: to change.
        """
        trial: Trial = part.state
        told, rows, last = seen_by(part, seen), rows_of(part, state.method), len(self.methods)
        old = state.falls[rows]
        falls = old.clone()
        falls[:, trial.code] = rates.fall(told, trial.lowest, age)
        state.falls = state.falls.index_copy(0, rows, torch.where(leaving.unsqueeze(1), falls, old))
        # Where all were tried, the one that made most progress goes on.
        follower: Tensor = falls.argmax(1).clamp_min(1)
        if trial.code < last:
            follower = torch.full_like(rows, trial.code + 1)
        # A method that got stuck, or did not get far, may have led astray.
        goes_on = rates.is_near(told, trial.lowest) & (trial.stuck(told) < self._patience(trial.code))
        keys = torch.where(leaving, torch.where(goes_on, follower, follower + last), 0)
        stays, *groups = grouped(keys, 2 * last + 1)
        for index, places in enumerate(groups):
            if len(places):
                code, history = index % last + 1, cut(part, places).state
                self._begin(code, rows[places], history, seen, state, goes_on=index < last)
        return stays

    def _begin(
        self,
        code: int,
        rows: Tensor,
        trial: Trial | None,
        seen: Seen,
        state: AutoState,
        *,
        goes_on: bool = False,
    ) -> None:
        """A method starts on some samples.

        It starts at their best iterates, with what the method before learnt if that led there; or where the
        solve began, as if it were the first.
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
        begun = Trial(code, told.step, rates.lowest(told), known, start, is_last=is_last)
        state.parts = state.parts.with_part(Part(rows, begun))

    # Steps -----------------------------------------------------------------------------------------------

    def step(self, z: Tensor, fz: Tensor, state: AutoState) -> tuple[Tensor, AutoState]:
        """A step of every method on its samples."""
        if state.step is None and state.has_plain:  # nothing is measured
            state = self._all_accelerated(z, state)
        z_next, lead = fz, state.lead
        if lead is not None and not lead.is_over:
            moved, lead.state = self.methods[0].step(z, fz, lead.state)
            z_next = torch.where(lead.led.unsqueeze(1), moved, fz) if state.has_plain else moved
        for part in state.parts.items:
            moved = move(self.methods[part.state.code - 1], part, z, fz)
            z_next = moved if part.rows is None else z_next.index_copy(0, part.rows, moved)
        state.recent = (*state.recent[1 - _RECENT :], (z, fz)) if state.has_plain else ()
        state.query = ask(self.methods, state.parts, z_next)
        return z_next, state

    def _all_accelerated(self, z: Tensor, state: AutoState) -> AutoState:
        """Samples without a method get the first one."""
        if not state.parts.items:
            return self._all_by_the_first(self.methods[0].init(z), z)
        rows = (state.method == 0).nonzero().squeeze(1)
        own = self._all_by_the_first(self.methods[0].init(z[rows]), z[rows]).parts.items[0].state
        method = state.method.clamp_min(1)
        return replace(state, method=method, has_plain=False, parts=state.parts.with_part(Part(rows, own)))

    def query(self, state: AutoState) -> Query | None:
        """What the methods at work ask for."""
        return state.query


def _leaving(told: Seen, at_work: Tensor, slow: Tensor | None) -> Tensor | None:
    """The samples among those at work that are lost or slow, bool (b,); `None`: nobody. The host reads once.

    Args:
        told: what was measured.
        at_work: bool, (b,).
        slow: the samples whose method is too slow, bool, (b,); `None`: nobody was judged by that.
    """
    lost, slow = rates.blown_up(told), None if slow is None else _without(slow, told.finished)
    which = slow if lost is None else lost if slow is None else lost | slow
    return None if which is None else _some(at_work & which)


def _without(which: Tensor, others: Tensor | None) -> Tensor:
    """Samples, bool (b,), without some; `None`: without nobody."""
    return which if others is None else which & ~others


def _some(which: Tensor) -> Tensor | None:
    """Samples, bool (b,), or `None` where there are none. The host reads."""
    return which if bool(which.any()) else None

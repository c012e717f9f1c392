"""The steps that Anderson acceleration and Broyden's method share.

Both take z <- f(z) - dF gamma, with dF the last differences of f-values (`history.py`). They differ in the
small system that gives gamma (`system.py`). What they do about a step that went wrong is the same
(`safeguards.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from ..fused import is_available
from ..solution import Solution
from .base import Seen, Solver, is_recorded, norm, within
from .history import History
from .safeguards import Safeguards
from .secant_state import Judged
from .secant_state import SecantState as SecantState
from .system import Equations


@dataclass(frozen=True, kw_only=True)
class SecantSolver(Solver):
    """Steps z <- f(z) - dF gamma with safeguards; a subclass says which system gives gamma."""

    memory: int
    growth: float
    restart: int | None

    @property
    @abstractmethod
    def equations(self) -> Equations:
        """The small system that gives gamma."""

    @property
    @abstractmethod
    def damping(self) -> float:
        """In (0, 1], what a step takes of the residual that the combination leaves."""

    @abstractmethod
    def most_columns(self, width: int) -> int:
        """How many columns help with a state of so many numbers, whatever `memory` allows; at least 1."""

    def init(self, z0: Tensor) -> SecantState:
        """Empty history."""
        memory = min(self.memory, self.most_columns(z0.shape[1]))
        return SecantState(
            History.empty(self.equations, z0, memory), Safeguards.begin(self.growth, self.restart, z0)
        )

    def resume(self, state: Any, z0: Tensor) -> SecantState:
        """The newest columns are kept, whichever secant method they are of, as many as there is room for.

        Raises:
            ValueError: `state` is not of a secant method, or not of states of the shape and type of `z0`.
        """
        if not isinstance(state, SecantState):
            way = "pass its state" if isinstance(state, Solution) else "leave it out to start afresh"
            raise ValueError(
                "state: expected the state of a solve by Anderson or Broyden, "
                f"got {type(state).__name__}; {way}"
            )
        df = state.history.df
        expected, got = (len(z0), z0.shape[1]), (len(df), df.shape[2])
        if expected != got or df.dtype != z0.dtype:
            raise ValueError(
                f"state: expected the state of a solve of {expected} (batch, numbers a sample) in "
                f"{z0.dtype}, got one of {got} in {df.dtype}; leave it out to start afresh"
            )
        fresh = self.init(z0)
        fresh.history.adopt(state.history)
        return fresh

    def observe(self, seen: Seen, state: SecantState) -> SecantState:
        """The last step is judged by what the driver measured; finished samples keep their history."""
        if is_available(state.history.df):
            from ..fused import secant as fused  # it is made of this package

            if fused.observed(seen, state):
                return state
        history, safeguards = state.history, state.safeguards
        history.freeze(seen.finished)
        if safeguards.singular is not None:
            seen.note("singular", safeguards.singular)
        refused, stagnated = safeguards.judge(seen.residual, seen.before, seen.all_improved, history)
        if refused is not None:
            seen.note("growth", refused)
        if stagnated is not None:
            seen.note("stagnation", stagnated)
        state.judged = Judged(seen.difference, refused)
        return state

    def step(self, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """One evaluation is one step; the first is a Picard step."""
        history = state.history
        if is_available(history.df):
            from ..fused import secant as fused  # it is made of this package

            moved = fused.stepped(z, fz, self.damping, state)
            if moved is not None:
                return moved, state
        residual, refused = _judged(z, fz, state)
        source = residual if history.uses_residuals else z
        history.close(fz, source, residual, refused)
        if refused is not None:
            history.drop(refused)
        if history.count:
            gamma, singular = history.system.coefficients(residual.dtype)
        else:
            gamma, singular = residual.new_zeros(residual.shape[0], 0), None
        state.safeguards.solved(history, singular)
        if is_recorded(gamma) and not history.left.requires_grad:
            history.left = history.left.clone()
        history.make_room()
        if self.damping != 1:
            z_next = history.combined(fz, gamma) - (1 - self.damping) * history.remaining(residual, gamma)
            history.put_left(source, refused)
        else:
            # This order saves a state of memory: the residual is freed before room is taken for z_next.
            history.put_left(source, refused)
            del residual, source
            z_next = history.combined(fz, gamma)
        history.put_images(fz, refused)
        if refused is not None:
            z_next = torch.where(refused.unsqueeze(1), history.half_step(), z_next)
        return z_next, state

    def catch_up(
        self, state: SecantState, recent: Sequence[tuple[Tensor, Tensor]], finished: Tensor | None
    ) -> None:
        """Learn from the last evaluations of samples that all are moved by another method.

        Args:
            state: of a solve that was not observed for a while, or never.
            recent: iterates and images, (B, D) each, in order.
            finished: samples whose history is to be left alone, bool, (B,); `None`: nobody.
        """
        state.watch(torch.ones_like(state.safeguards.best, dtype=torch.bool))
        state.history.pending = False
        state.history.freeze(finished)
        for z, fz in recent:
            self.step(z, fz, state)

    def take_over(self, state: SecantState, which: Tensor, best: Tensor, step: int) -> None:
        """Move samples that were watched from now on.

        They keep their newest two columns alone, so what the method does to them does not depend on how long
        it has been watching.

        Args:
            state: of a solve that has caught up.
            which: the samples, bool, (B,).
            best: the smallest residual of each sample, (B,).
            step: evaluations of the solve before this one. Whether samples stagnate is judged every `restart`
                of these.
        """
        if state.history.num_columns > 2:
            state.history.drop(which, spared=2)
        state.safeguards.take_over(which, best, step)


def check_secant(owner: str, memory: int, growth: float, restart: int | None) -> None:
    """Raise `TypeError` or `ValueError` unless these are settings of a secant method."""
    check_integer(owner, 1, memory=memory)
    check_number(owner, 1, growth=growth)
    if restart is not None:
        check_integer(owner, 1, restart=restart)


def _judged(z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, Tensor | None]:
    """The residual vector (B, D) and the samples that must undo their last step."""
    judged, state.judged = state.judged, None
    difference = None if judged is None else judged.difference
    residual = fz - z if difference is None or is_recorded(z, fz) else difference
    if judged is not None:
        return residual, judged.refused
    size, best = norm(residual), state.safeguards.best
    refused, _ = state.safeguards.judge(size, best, within(size, best), state.history)
    return residual, refused

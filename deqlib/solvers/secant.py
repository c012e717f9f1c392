"""What Anderson acceleration and Broyden's method share: a history of differences, and safeguards.

Both take z <- f(z) - dF gamma, with dF the last differences of f-values; they differ in the small system
that gives gamma. Its right side is left^T r, with a second set of columns, `left`: differences of residuals
(Anderson, type II) or of iterates (type I and Broyden). Its matrix is kept, and a new column adds a row and
a column to it.

A column is made in place. Its slot first holds the value at an iterate ("pending"); when the next iterate
arrives, that is subtracted. So the history takes 2 * memory states and nothing else of the past is kept.
The sign of a column does not matter as long as both sets agree.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from .base import (
    Solver,
    can_look,
    combination,
    is_recorded,
    products,
    small_dtype,
    solve_small,
    write_row,
)

_CAUSES = ("growth", "singular", "stagnation")


@dataclass(eq=False)
class SecantState:
    """History of a batch. A step changes it in place."""

    count: int  # columns begun so far; the next one lies at count % memory
    pending: bool  # whether that slot holds the values of the iterate before
    window: int  # steps since `then` was taken
    df: Tensor  # (B, memory, D)
    left: Tensor  # (B, memory, D)
    system: Tensor  # (B, memory, memory), the matrix for gamma
    best: Tensor  # (B,), smallest residual
    then: Tensor  # (B,), what it was a window ago
    causes: Tensor  # (B, 3), steps refused, by cause
    born: Tensor | None = None  # (B, memory), see `births`; None while all samples have the same history
    frozen: Tensor | None = None  # (B,), samples whose history is to be left alone
    uses_residuals: bool = True  # what `left` holds, see `SecantSolver`
    method: str = ""  # whose matrix it is

    def births(self) -> Tensor:
        """The count at which each column was made, -1 where there is none, (B, memory)."""
        if self.born is not None:
            return self.born
        return _common_births(self).expand(self.best.shape[0], -1)

    def closed(self) -> Tensor:
        """The births without those of pending values, which are no columns yet, (B, memory)."""
        births = self.births().clone()
        if self.pending and self.frozen is None:  # else `born` says it already
            births[:, self.count % births.shape[1]] = -1
        return births

    def transposed(
        self,
        g: Tensor,  # (B, D)
    ) -> Tensor:
        """-B^T g (B, D), with B the estimate of (J - I)^-1 that the steps z <- z - B r amount to.

        z - B r = f(z) - dF M^-1 left^T r, so -B^T g = g - left M^-T dF^T g. Values still
        pending are left out; samples without columns, or whose system is singular, get g. The history is
        left as it is.
        """
        size = min(self.count, self.system.shape[1])
        if size == 0:
            return g
        usable = self.closed()[:, :size] >= 0
        rhs = products(self.df[:, :size], g).to(self.system.dtype)
        coefficients, _ = solve_small(self.system[:, :size, :size].mT, rhs, usable)
        # What a sample lost may not be finite, and a coefficient of zero does not silence NaN.
        left = torch.where(usable.unsqueeze(2), self.left[:, :size], 0)
        return g - combination(coefficients.to(g.dtype), left)


@dataclass(frozen=True, kw_only=True)
class SecantSolver(Solver):
    """Steps z <- f(z) - dF gamma with safeguards; subclasses say which system gives gamma."""

    memory: int
    growth: float
    restart: int | None

    def __post_init__(self) -> None:
        """Validate."""
        name = type(self).__name__
        check_integer(name, 1, memory=self.memory)
        check_number(name, 1, growth=self.growth)
        if self.restart is not None:
            check_integer(name, 1, restart=self.restart)

    @property
    def undoes(self) -> bool:
        """Steps that grow the residual too much are refused."""
        return True

    @property
    @abstractmethod
    def uses_residuals(self) -> bool:
        """Whether `left` holds differences of residuals; else of iterates."""

    @property
    @abstractmethod
    def method(self) -> str:
        """Names the matrix, so that a history is not taken for another's."""

    @abstractmethod
    def entries(
        self,
        left: Tensor,  # (B, m, D)
        df: Tensor,  # (B, m, D)
        newest: int,
    ) -> tuple[Tensor, Tensor]:
        """Row and column (B, m) that one of the columns adds to the matrix; the diagonal is the column's."""

    def largest_coefficient(self, dtype: torch.dtype) -> float:
        """Entries of gamma from here on mean a singular system."""
        # Columns carry rounding errors, and gamma enlarges them: beyond this they are all that is left.
        return float(3 * torch.finfo(dtype).eps ** -0.5)

    def init(self, z0: Tensor) -> SecantState:
        """Empty history."""
        batch, width = z0.shape
        unknown = z0.new_full((batch,), torch.inf)
        # What was never written is never used, but its gradient is: zero times what happens to lie there.
        columns = z0.new_zeros if torch.is_grad_enabled() else z0.new_empty
        return SecantState(
            count=0,
            pending=False,
            window=0,
            df=columns(batch, self.memory, width),
            left=columns(batch, self.memory, width),
            system=z0.new_zeros(batch, self.memory, self.memory, dtype=small_dtype(z0)),
            best=unknown,
            then=unknown,
            causes=torch.zeros(batch, len(_CAUSES), dtype=torch.int64, device=z0.device),
            uses_residuals=self.uses_residuals,
            method=self.method,
        )

    def resume(self, state: Any, z0: Tensor) -> SecantState:
        """The columns are kept; the pending values belong to the old map and are dropped."""
        expected = (z0.shape[0], self.memory, z0.shape[1])
        if not isinstance(state, SecantState) or state.df.shape != expected or state.df.dtype != z0.dtype:
            got = type(state).__name__
            if isinstance(state, SecantState):
                got = f"one of {tuple(state.df.shape)} in {state.df.dtype}"
            raise ValueError(
                f"state: expected the state of a {type(self).__name__} solve of {expected} "
                f"(batch, memory, numbers a sample) in {z0.dtype}, got {got}; leave it out to start afresh"
            )
        if state.method != self.method:
            raise ValueError(
                f"state: expected the state of a solve by {self.method}, got one by {state.method}; leave it "
                "out to start afresh"
            )
        return self.adopt(state, z0)

    def adopt(self, state: Any, z0: Tensor) -> SecantState:
        """The newest columns of another history are kept, as many as there is room for."""
        fresh = self.init(z0)
        if not isinstance(state, SecantState):
            return fresh
        kept = min(state.count, state.df.shape[1], self.memory)
        slots = [(state.count - kept + i) % state.df.shape[1] for i in range(kept)]
        births = state.closed()[:, slots]
        df, left = state.df[:, slots].detach(), state.left[:, slots].detach()
        # What a sample lost or blew up must not come back: a coefficient of zero does not silence NaN.
        births = torch.where((df.sum(2) + left.sum(2)).isfinite(), births, -1)
        kept_of = (births >= 0).unsqueeze(2)
        df, left = (torch.where(kept_of, columns, torch.zeros_like(columns)) for columns in (df, left))
        if state.uses_residuals != self.uses_residuals:
            left = df - left  # differences of residuals and of iterates add up to those of f-values
        fresh.df[:, :kept], fresh.left[:, :kept] = df, left
        if state.method == self.method:
            fresh.system[:, :kept, :kept] = state.system[:, slots][:, :, slots]
        else:
            for newest in range(kept):
                known = slice(newest + 1)
                self._extend(fresh, left[:, known], df[:, known], newest)
        fresh.count = kept
        fresh.born = births.new_full((len(births), self.memory), -1)
        fresh.born[:, :kept] = torch.where(births >= 0, births.new_tensor(range(kept)), -1)
        return fresh

    def freeze(self, state: SecantState, finished: Tensor) -> SecantState:
        """Leave the history of finished samples alone."""
        born = state.births()
        if state.pending:  # those frozen before keep theirs: they have nothing pending there
            fresh = torch.ones_like(finished) if state.frozen is None else ~state.frozen
            born = born.clone()
            slot = state.count % self.memory
            born[:, slot] = torch.where(fresh, -1, born[:, slot])
        state.frozen, state.born = finished, born
        return state

    def rejections(self, state: SecantState) -> dict[str, Tensor]:
        """By cause: the residual grew, the system was singular, the best residual stagnated."""
        return {cause: state.causes[:, i] for i, cause in enumerate(_CAUSES)}

    def step(self, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """One evaluation is one step; the first is a Picard step."""
        residual = fz - z
        source = residual if self.uses_residuals else z
        refused = self._judge(torch.linalg.vector_norm(residual.detach(), dim=1), state)
        if state.pending:
            self._close_column(fz, source, refused, state)
        if refused is not None:
            _forget(state, refused, cause="growth")
        gamma = self._coefficients(residual, state)
        slot = state.count % self.memory
        if self._needs_residual:
            z_next = self._combine(fz, residual, gamma, state)
            state.left = _put(state.left, slot, source, refused, state)
        else:
            # The order saves a state of memory: the residual is freed before its place is needed.
            state.left = _put(state.left, slot, source, refused, state)
            del residual, source
            z_next = self._combine(fz, None, gamma, state)
        state.df = _put(state.df, slot, fz, refused, state)
        if state.born is not None:
            state.born = _set_birth(state.born, slot, -1, state.frozen)
        state.pending = True
        if refused is not None:
            z_next = self._half_step(z_next, refused, state.df[:, slot], state.left[:, slot])
        return z_next, state

    def _half_step(self, z_next: Tensor, refused: Tensor, fz: Tensor, source: Tensor) -> Tensor:
        """`z_next`, where refused half a Picard step from the iterate before, whose values are given."""
        again = refused.unsqueeze(1)
        parts = (1.0, -0.5) if self.uses_residuals else (0.5, 0.5)
        if is_recorded(z_next, fz, source):
            return torch.where(again, parts[0] * fz + parts[1] * source, z_next)
        share = again.to(z_next.dtype)
        z_next = z_next.masked_fill_(again, 0)  # a tensor of its own: nothing is refused without columns
        return z_next.addcmul_(fz, share, value=parts[0]).addcmul_(source, share, value=parts[1])

    @property
    def _needs_residual(self) -> bool:
        """Whether `_combine` does."""
        return False

    def _combine(self, fz: Tensor, residual: Tensor | None, gamma: Tensor, state: SecantState) -> Tensor:
        """f(z) - dF gamma."""
        size = gamma.shape[1]
        if size == 0:
            return fz
        return torch.baddbmm(fz.unsqueeze(1), gamma.unsqueeze(1), state.df[:, :size], alpha=-1).squeeze(1)

    def _judge(self, norm: Tensor, state: SecantState) -> Tensor | None:
        """Which samples must undo their last step (None: none); stagnating ones forget their history."""
        looking = can_look(norm)
        refused = None
        # A plain step is never refused, so refusing cannot go on for ever.
        if state.count and not (looking and bool((norm <= state.best).all())):
            refused = ~(norm <= self.growth * state.best)  # true for NaN
            if looking and not bool(refused.any()):
                refused = None
            elif state.born is not None:
                refused = refused & (state.born >= 0).any(1)
        if refused is not None and state.frozen is not None:
            refused = refused & ~state.frozen
        state.best, state.window = torch.fmin(state.best, norm), state.window + 1
        if self.restart is None or state.window < self.restart:
            return refused
        stagnated = (state.best >= state.then) & (state.best < torch.inf)
        if state.frozen is not None:
            stagnated = stagnated & ~state.frozen
        state.then, state.window = state.best, 0
        if state.count and not (looking and not bool(stagnated.any())):
            _forget(state, stagnated, cause="stagnation")
        return refused

    def _close_column(self, fz: Tensor, source: Tensor, refused: Tensor | None, state: SecantState) -> None:
        """Turn the pending values into a column, unless refused, and extend the matrix."""
        slot, size = state.count % self.memory, min(state.count + 1, self.memory)
        spared = state.frozen if refused is None or state.frozen is None else state.frozen | refused
        spared = refused if spared is None else spared
        state.df = _subtract(state.df, slot, fz, spared)
        state.left = _subtract(state.left, slot, source, spared)
        self._extend(state, state.left[:, :size], state.df[:, :size], slot)
        if state.born is not None:
            state.born = _set_birth(state.born, slot, state.count, state.frozen)
        state.count += 1

    def _extend(self, state: SecantState, left: Tensor, df: Tensor, newest: int) -> None:
        """Add the row and the column of the newest of these columns to the matrix."""
        row, column = self.entries(left, df, newest)
        column = column.to(state.system.dtype)
        column[:, newest].sub_(torch.finfo(column.dtype).tiny)  # a sample at rest has columns of zeros
        state.system = _write_cross(state.system, newest, row, column, state.frozen)

    def _coefficients(self, residual: Tensor, state: SecantState) -> Tensor:
        """gamma (B, columns), zero where the system cannot be solved: those samples start anew."""
        size = min(state.count, self.memory)
        if size == 0:
            return residual.new_zeros(residual.shape[0], 0)
        system = state.system[:, :size, :size]
        rhs = products(state.left[:, :size], residual).to(system.dtype)
        usable = None if state.born is None else state.born[:, :size] >= 0
        gamma, failed = solve_small(system, rhs, usable, limit=self.largest_coefficient(residual.dtype))
        if failed is not None:
            _forget(state, failed, cause="singular")
        return gamma.to(residual.dtype)


def _common_births(state: SecantState) -> Tensor:
    """The births (1, memory) that all samples share."""
    memory = state.system.shape[1]
    slots = torch.arange(memory, device=state.system.device)
    return (state.count - 1 - (state.count - 1 - slots) % memory).clamp_min(-1).unsqueeze(0)


def _set_birth(born: Tensor, slot: int, birth: int, frozen: Tensor | None) -> Tensor:
    born = born.clone()
    born[:, slot] = birth if frozen is None else torch.where(frozen, born[:, slot], birth)
    return born


def _forget(state: SecantState, which: Tensor, *, cause: str) -> None:
    """These samples lose their columns."""
    state.causes = state.causes.clone()
    state.causes[:, _CAUSES.index(cause)] += which
    state.born = state.births().masked_fill(which.unsqueeze(1), -1)


def _subtract(rows: Tensor, slot: int, value: Tensor, spared: Tensor | None) -> Tensor:
    """`rows` with `value` subtracted from one row, some samples spared."""
    if is_recorded(rows, value):
        old, new = rows[:, slot], rows[:, slot] - value
        return write_row(rows, slot, new if spared is None else torch.where(spared.unsqueeze(1), old, new))
    if spared is None:
        rows[:, slot].sub_(value)
    else:
        rows[:, slot].addcmul_(value, (~spared).to(value.dtype).unsqueeze(1), value=-1)
    return rows


def _put(rows: Tensor, slot: int, value: Tensor, refused: Tensor | None, state: SecantState) -> Tensor:
    """`rows` with one row replaced: frozen samples keep theirs, refused ones what was pending before."""
    choices = []
    if refused is not None:
        choices.append((refused, rows[:, (state.count - 1) % rows.shape[1]]))
    if state.frozen is not None:
        choices.append((state.frozen, rows[:, slot]))
    if len(choices) == 1 and not is_recorded(rows, value) and not torch.compiler.is_compiling():
        which, kept = choices[0]
        torch.where(which.unsqueeze(1), kept, value, out=rows[:, slot])
        return rows
    for which, kept in choices:
        value = torch.where(which.unsqueeze(1), kept, value)
    return write_row(rows, slot, value)


def _write_cross(matrix: Tensor, slot: int, row: Tensor, column: Tensor, frozen: Tensor | None) -> Tensor:
    """`matrix` (B, m, m) with the first entries of one row and one column replaced."""
    size = row.shape[1]
    if frozen is not None:
        frozen = frozen.unsqueeze(1)
        row = torch.where(frozen, matrix[:, slot, :size], row.to(matrix.dtype))
        column = torch.where(frozen, matrix[:, :size, slot], column.to(matrix.dtype))
    if not is_recorded(matrix, row, column):
        matrix[:, slot, :size] = row
        matrix[:, :size, slot] = column
        return matrix
    rest = matrix.shape[1] - size
    row, column = (torch.nn.functional.pad(e.to(matrix.dtype), (0, rest)) for e in (row, column))
    return write_row(write_row(matrix, slot, row).mT, slot, column).mT

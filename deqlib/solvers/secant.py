"""What Anderson acceleration and Broyden's method share: a history of differences, and safeguards.

Both take z <- f(z) - dF gamma, with dF the last differences of f-values; they differ in the small system
that gives gamma. Its right side is left^T r, with a second set of columns, `left`: differences of residuals
(Anderson, type II) or of iterates (type I and Broyden). Its matrix is kept, and a new column adds a row and
a column to it.

A column is made in place. Its slot first holds the values at an iterate ("pending"); when the next iterate
arrives, its values are subtracted. So m columns take 2 m states and nothing else of the past is kept. The
sign of a column does not matter as long as both sets agree. Slots are added as they are needed; when there
are as many as `memory`, or as a sample has numbers, the newest column takes the place of the oldest.

A sample that begins a new history loses its columns: in the matrix, their rows and columns become those of
the identity, and zero on the right side keeps their coefficients at zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer, check_number
from .base import (
    Seen,
    Solver,
    anyone,
    combination,
    is_recorded,
    norm,
    products,
    small_dtype,
    solve_small,
    with_room,
    within,
    write_row,
)


@dataclass(eq=False)
class SecantState:
    """History of a batch. A step changes it in place."""

    memory: int  # most columns kept
    count: int  # columns begun so far
    pending: bool  # whether the newest of them holds the values at the iterate before
    window: int  # steps since `then` was taken
    df: Tensor  # (B, slots, D)
    left: Tensor  # (B, slots, D)
    system: Tensor  # (B, slots, slots), the matrix for gamma
    scale: Tensor  # (B, slots, slots), what a new column of the matrix is multiplied by
    shift: Tensor  # (B, slots, slots), and what is added to it, to keep its diagonal away from zero
    best: Tensor  # (B,), smallest residual
    then: Tensor  # (B,), the smallest residual when the window began
    products: Tensor | None = None  # (B, columns), left^T r at the last step
    alive: Tensor | None = None  # (B, slots), bool, columns that a sample has; None: every sample has all
    plain: Tensor | None = None  # (B,), bool, samples whose last step was a Picard step; None: nobody
    failed: Tensor | None = None  # (B,), bool, samples whose last system had no solution; None: nobody
    finished: Tensor | None = None  # (B,), bool, samples that had nothing pending put; None: nobody
    idle: Tensor | None = None  # (B,), bool, samples that go their own way, see `lead`; None: nobody
    ended: Tensor | None = None  # (B,), int64, `count` + 1 when a sample finished; 0, None: it did not
    moving: Tensor | None = None  # (B, 1), 1 for the samples that are not finished, else 0; None: all are 1
    lost_at: int | None = None  # `count` when a sample last lost its columns; None: never
    uses_residuals: bool = True  # what `left` holds, see `SecantSolver`
    method: str = ""  # whose matrix it is
    # What `observe` found out for the step that follows:
    is_judged: bool = False  # whether it was called
    difference: Tensor | None = None  # (B, D), the residual vector
    refused: Tensor | None = None  # (B,), bool, samples that must undo their last step; None: nobody
    leaving: Tensor | None = None  # (B,), bool, samples whose history is to be left alone; None: nobody

    @property
    def slot(self) -> int:
        """Where the newest column lies, or will lie."""
        return self.count % self.memory

    @property
    def num_columns(self) -> int:
        """Slots that hold finished columns, the pending one aside."""
        return min(self.count, self.memory)

    @property
    def has_gaps(self) -> bool:
        """Whether a sample that is not finished may lack columns that others have."""
        return self.lost_at is not None and self.count - self.lost_at < self.memory

    def columns(self) -> Tensor:
        """Which columns each sample has, the pending one left out, bool, (B, number of them)."""
        size = self.num_columns
        if self.alive is not None:
            return self.alive[:, :size]
        found = torch.ones(self.best.shape[0], size, dtype=torch.bool, device=self.best.device)
        if self.pending and self.slot < size:
            found[:, self.slot] = False
        return found

    def oldest_first(self) -> Tensor:
        """Slots of each sample's columns by age, int64, (B, number of columns).

        Those that hold none of a sample's come first. How many these are hangs on its batch-mates, as the
        number of columns does; the order of its own does not.
        """
        size, alive = self.num_columns, self.columns()
        # Where a sample's history ended: a finished one keeps its own while others go on.
        counts = torch.full_like(alive[:, :1], self.count, dtype=torch.int64)
        if self.ended is not None:
            ended = self.ended.unsqueeze(1)
            counts = torch.where(ended > 0, ended - 1, counts)
        places = torch.arange(size, device=alive.device)
        order = (counts - size + places) % max(size, 1)
        ranks = alive.gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices
        return order.gather(1, ranks)

    def let_go(self, which: Tensor) -> None:
        """These samples, bool (B,), go their own way: see `SecantSolver.lead`."""
        self.idle = which if self.idle is None else self.idle | which

    def transposed(
        self,
        g: Tensor,  # (B, D)
    ) -> Tensor:
        """-B^T g (B, D), with B the estimate of (J - I)^-1 that the steps z <- z - B r amount to.

        z - B r = f(z) - dF M^-1 left^T r, so -B^T g = g - left M^-T dF^T g. Values still
        pending are left out; samples without columns, or whose system is singular, get g. The history is
        left as it is.
        """
        size = self.num_columns
        if size == 0:
            return g
        usable = self.columns()
        rhs = products(self.df[:, :size], g).to(self.system.dtype)
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        known = usable.unsqueeze(1) & usable.unsqueeze(2)
        system = torch.where(known, self.system[:, :size, :size].mT, identity)
        coefficients, _ = solve_small(system, torch.where(usable, rhs, 0))
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
    @abstractmethod
    def uses_residuals(self) -> bool:
        """Whether `left` holds differences of residuals; else of iterates."""

    @property
    @abstractmethod
    def method(self) -> str:
        """Names the matrix, so that a history is not taken for another's."""

    @abstractmethod
    def row(
        self,
        left: Tensor,  # (B, m, D)
        df: Tensor,  # (B, m, D)
        newest: int,
        column: Tensor,  # (B, m)
    ) -> Tensor:
        """Row (B, m) that one of the columns adds to the matrix, given the column left^T dr that it adds.

        The diagonal is taken from the column.
        """

    def most_columns(self, width: int) -> int:
        """How many columns help with a state of so many numbers, and one for the pending values."""
        return max(width, 1) + 1

    @property
    def diagonal_factor(self) -> float:
        """What the newest entry of the diagonal is multiplied by."""
        return 1.0

    def diagonal(
        self,
        left: Tensor,  # (B, D)
        change: Tensor,  # (B, D), of the residual
    ) -> Tensor:
        """Entry (B,) of the diagonal for the newest column: left^T dr, kept away from zero."""
        return products(left.unsqueeze(1), change).squeeze(1)

    def largest_coefficient(self, dtype: torch.dtype) -> float:
        """Entries of gamma from here on mean a singular system."""
        # Columns carry rounding errors, and gamma enlarges them: beyond this they are all that is left.
        return float(3 * torch.finfo(dtype).eps ** -0.5)

    def init(self, z0: Tensor) -> SecantState:
        """Empty history."""
        batch, width = z0.shape
        unknown = z0.new_full((batch,), torch.inf)
        system, scale, shift = self._matrices(z0, 0)
        return SecantState(
            memory=min(self.memory, self.most_columns(width)),
            count=0,
            pending=False,
            window=0,
            df=z0.new_zeros(batch, 0, width),
            left=z0.new_zeros(batch, 0, width),
            system=system,
            scale=scale,
            shift=shift,
            best=unknown,
            then=unknown,
            uses_residuals=self.uses_residuals,
            method=self.method,
        )

    def _matrices(self, z0: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """`system`, `scale` and `shift` for so many columns, none of which there is."""
        dtype = small_dtype(z0)
        identity = torch.eye(slots, dtype=dtype, device=z0.device).expand(z0.shape[0], slots, slots)
        # The shift is for samples at rest, whose columns are zero.
        scale, shift = 1 + (self.diagonal_factor - 1) * identity[:1], -torch.finfo(dtype).tiny * identity[:1]
        return identity, scale.expand_as(identity), shift.expand_as(identity)

    def resume(self, state: Any, z0: Tensor) -> SecantState:
        """The newest columns are kept, whichever secant method they are of, as many as there is room for.

        The pending values belong to the old map and are dropped.
        """
        if not isinstance(state, SecantState):
            raise ValueError(
                f"state: expected the state of a solve by Anderson or Broyden, got {type(state).__name__}; "
                "leave it out to start afresh"
            )
        expected, got = (len(z0), z0.shape[1]), (len(state.df), state.df.shape[2])
        if expected != got or state.df.dtype != z0.dtype:
            raise ValueError(
                f"state: expected the state of a solve of {expected} (batch, numbers a sample) in "
                f"{z0.dtype}, got one of {got} in {state.df.dtype}; leave it out to start afresh"
            )
        fresh = self.init(z0)
        slots = state.oldest_first()[:, -fresh.memory :]
        kept = slots.shape[1]
        df, left = (rows.detach().take_along_dim(slots.unsqueeze(2), 1) for rows in (state.df, state.left))
        # What a sample lost or blew up must not come back: a coefficient of zero does not silence NaN.
        alive = state.columns().gather(1, slots) & (df.sum(2) + left.sum(2)).isfinite()
        df, left = (torch.where(alive.unsqueeze(2), columns, 0) for columns in (df, left))
        if state.uses_residuals != self.uses_residuals:
            left = df - left  # differences of residuals and of iterates add up to those of f-values
        fresh.df, fresh.left, fresh.count = df, left, kept
        fresh.alive, fresh.lost_at = alive, 0
        identity, fresh.scale, fresh.shift = self._matrices(z0, kept)
        if state.method == self.method:
            known = alive.unsqueeze(1) & alive.unsqueeze(2)
            system = state.system.take_along_dim(slots.unsqueeze(2), 1)
            fresh.system = torch.where(known, system.take_along_dim(slots.unsqueeze(1), 2), identity)
            return fresh
        fresh.system = identity.clone()
        for newest in range(kept):
            known = left[:, : newest + 1]
            change = left[:, newest] if self.uses_residuals else df[:, newest] - left[:, newest]
            self._extend(fresh, newest, products(known, change))
        return fresh

    def observe(self, seen: Seen, state: SecantState) -> SecantState:
        """The last step is judged by what the driver measured; finished samples keep their history."""
        if seen.finished is not state.finished and seen.finished is not None:
            ended = torch.zeros_like(seen.since) if state.ended is None else state.ended
            state.ended = torch.where(seen.finished & (ended == 0), state.count + 1, ended)
        if seen.finished is not state.finished:
            state.moving = None if seen.finished is None else (~seen.finished).to(state.df.dtype).unsqueeze(1)
        state.is_judged, state.difference, state.leaving = True, seen.difference, seen.finished
        if state.failed is not None:
            seen.note("singular", state.failed)
        state.refused, stagnated = self._judge(
            seen.residual, seen.before, seen.all_improved, seen.finished, state
        )
        if state.refused is not None:
            seen.note("growth", state.refused)
        if stagnated is not None:
            seen.note("stagnation", stagnated)
        if state.alive is None and seen.finished is not None:
            missing = state.df.shape[1] - state.num_columns
            state.alive = torch.nn.functional.pad(state.columns(), (0, missing))
        return state

    def step(self, z: Tensor, fz: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        """One evaluation is one step; the first is a Picard step."""
        residual, state.difference = state.difference, None
        residual = fz - z if residual is None or is_recorded(z, fz) else residual
        if not state.is_judged:
            size = norm(residual)
            improved = within(size, state.best)
            state.refused, _ = self._judge(size, state.best, improved, None, state)
        refused, finished = state.refused, state.leaving
        state.is_judged, state.refused, state.leaving = False, None, None
        source = residual if self.uses_residuals else z
        state.finished = finished
        is_new = state.pending
        if is_new:
            self._close_column(fz, source, refused, state)
        rhs = products(state.left[:, : state.num_columns], residual) if state.count else None
        if rhs is not None and state.alive is not None and state.has_gaps:
            rhs = torch.where(state.alive[:, : rhs.shape[1]], rhs, 0)
        if is_new and rhs is not None:
            self._extend(state, (state.count - 1) % state.memory, self._column(rhs, state))
        state.products = rhs
        if refused is not None:
            _forget(state, refused)
        gamma = self._coefficients(residual, state.products, state)
        if is_recorded(gamma) and not state.left.requires_grad:
            state.left = state.left.clone()
        self._make_room(state, finished)
        if self._needs_residual:
            z_next = self._combine(fz, residual, gamma, state)
            state.left = _put(state.left, source, refused, finished, state)
        else:
            # The order saves a state of memory: the residual is freed before its place is needed.
            state.left = _put(state.left, source, refused, finished, state)
            del residual, source
            z_next = self._combine(fz, None, gamma, state)
        state.df = _put(state.df, fz, refused, finished, state)
        state.pending = True
        if refused is not None:
            z_next = self._half_step(z_next, refused, state.df[:, state.slot], state.left[:, state.slot])
        return z_next, state

    def catch_up(
        self, state: SecantState, recent: Sequence[tuple[Tensor, Tensor]], finished: Tensor | None
    ) -> None:
        """Learn from the last evaluations, iterates and images, of samples that all go their own way.

        Args:
            state: of a solve that was not watched for a while, or never.
            recent: the evaluations, in order.
            finished: samples whose history is to be left alone, bool, (B,); `None`: nobody.
        """
        state.let_go(torch.ones_like(state.best, dtype=torch.bool))
        state.pending = False
        for z, fz in recent:
            state.leaving = finished
            self.step(z, fz, state)

    def lead(self, state: SecantState, which: Tensor, lowest: Tensor, step: int) -> None:
        """Samples that went their own way, bool (B,), are led by the method from now on.

        What it does to them does not depend on how long it was watching: they keep their newest two columns.

        Args:
            state: in which all samples are idle at first.
            which: the samples.
            lowest: the smallest residual of each sample, (B,).
            step: evaluations of the solve before this one; samples stagnate or not every `restart` of these.
        """
        if state.num_columns > 2:
            _forget(state, which, spared=2)
        idle = ~which if state.idle is None else state.idle & ~which
        state.idle = idle if anyone(idle) else None
        state.best = torch.where(which, lowest, state.best)
        state.then = torch.where(which, torch.inf, state.then)
        if self.restart is not None:
            state.window = step % self.restart

    def _half_step(self, z_next: Tensor, refused: Tensor, fz: Tensor, source: Tensor) -> Tensor:
        """`z_next`, where refused half a Picard step from the iterate before, whose values are given."""
        back = torch.add(fz, source, alpha=-0.5) if self.uses_residuals else torch.lerp(fz, source, 0.5)
        return torch.where(refused.unsqueeze(1), back, z_next)

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

    def _judge(
        self, size: Tensor, best: Tensor, all_improved: bool, finished: Tensor | None, state: SecantState
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which samples must undo their last step, and which stagnate and lose their columns (None: none).

        Args:
            size: norms of the residuals, (B,).
            best: the smallest before, (B,).
            all_improved: whether the host knows that all of them are smaller.
            finished: samples that are not to be judged, bool, (B,).
            state: of the solve.
        """
        refused = stagnated = None
        # A plain step is never refused, so refusing cannot go on for ever.
        if state.count and not all_improved:
            refused = ~(size <= self.growth * best)  # true for NaN
            for exempt in (state.plain, finished, state.idle):
                refused = refused if exempt is None else refused & ~exempt
            refused = refused if anyone(refused) else None
        state.best = size if all_improved else torch.fmin(state.best, size)
        if state.failed is not None:
            _forget(state, state.failed)
            state.failed = None
        state.window += 1
        if self.restart is not None and state.window >= self.restart:
            stagnated = (state.best >= state.then) & (state.best < torch.inf)
            for exempt in (finished, state.idle):
                stagnated = stagnated if exempt is None else stagnated & ~exempt
            state.then, state.window = state.best, 0
            stagnated = stagnated if state.count and anyone(stagnated) else None
            if stagnated is not None:
                _forget(state, stagnated)
        return refused, stagnated

    def _close_column(self, fz: Tensor, source: Tensor, refused: Tensor | None, state: SecantState) -> None:
        """Turn the pending values into a column, unless refused, and extend the matrix."""
        slot, finished = state.slot, state.finished
        moving = state.moving
        if refused is None and moving is not None and not is_recorded(state.df, fz):
            state.df[:, slot].addcmul_(fz, moving, value=-1)
            state.left[:, slot].addcmul_(source, moving, value=-1)
        else:
            spared = finished if refused is None or finished is None else finished | refused
            spared = refused if spared is None else spared
            state.df = _subtract(state.df, slot, fz, spared)
            state.left = _subtract(state.left, slot, source, spared)
        state.count, state.pending = state.count + 1, False
        if state.alive is not None:
            # For autograd it may have been saved, in which case it must not be written to.
            alive = state.alive.clone() if is_recorded(state.df) else state.alive
            if finished is None:
                alive[:, slot].fill_(True)
            else:
                alive[:, slot].logical_or_(~finished)
            state.alive = alive

    def _column(self, rhs: Tensor, state: SecantState) -> Tensor:
        """left^T dr (B, columns) for the newest column, without going through the history again.

        For older columns it is the change of left^T r since the step before; of the newest the entry is
        computed, since the two may be nearly the same there.
        """
        slot = (state.count - 1) % state.memory
        left = state.left[:, slot]
        change = left if self.uses_residuals else state.df[:, slot] - left
        entry = self.diagonal(left, change)
        before, size = state.products, rhs.shape[1]
        if before is None:
            return entry.unsqueeze(1)
        older = before - rhs[:, : before.shape[1]]
        if is_recorded(older, entry):
            return torch.cat([older[:, :slot], entry.unsqueeze(1), older[:, slot + 1 :]], 1)[:, :size]
        if slot < older.shape[1]:
            older[:, slot] = entry
            return older
        return torch.cat([older, entry.unsqueeze(1)], 1)

    def _extend(self, state: SecantState, newest: int, column: Tensor) -> None:
        """Add the row and the column of the newest column to the matrix."""
        size = column.shape[1]
        row = self.row(state.left[:, :size], state.df[:, :size], newest, column)
        if row is not column and state.alive is not None and state.has_gaps:
            row = torch.where(state.alive[:, :size], row, 0)
        state.system = _write_cross(state, newest, row, column)

    def _make_room(self, state: SecantState, finished: Tensor | None) -> None:
        """A slot for the values of this iterate, which the newest column will be made of."""
        slots, slot, pad = state.df.shape[1], state.slot, torch.nn.functional.pad
        if slot < slots:
            if (
                state.alive is not None and state.count >= state.memory
            ):  # the column that was there goes, but for samples that are finished
                alive = state.alive.clone() if is_recorded(state.df) else state.alive
                if finished is None:
                    alive[:, slot].fill_(False)
                else:
                    alive[:, slot].logical_and_(finished)
                state.alive = alive
            return
        old = state.system
        state.df = with_room(state.df, slot, state.memory)
        state.left = with_room(state.left, slot, state.memory)
        system, state.scale, state.shift = self._matrices(state.df[:, 0], state.df.shape[1])
        state.system = system.clone()
        state.system[:, :slots, :slots] = old
        if state.alive is not None:
            state.alive = pad(state.alive, (0, state.df.shape[1] - slots))

    def _coefficients(self, residual: Tensor, rhs: Tensor | None, state: SecantState) -> Tensor:
        """gamma (B, columns), zero where the system cannot be solved: those samples start anew."""
        size, state.plain = state.num_columns, None
        if rhs is None:
            return residual.new_zeros(residual.shape[0], 0)
        rhs = rhs.to(state.system.dtype)
        if state.alive is not None and state.lost_at == state.count:  # a column more, and nobody is without
            state.plain = ~state.alive[:, :size].any(1)
        limit = self.largest_coefficient(residual.dtype)
        gamma, state.failed = solve_small(state.system[:, :size, :size], rhs, limit=limit)
        if state.failed is not None:
            state.plain = state.failed if state.plain is None else state.plain | state.failed
            state.failed = state.failed if state.idle is None else state.failed & ~state.idle
        return gamma.to(residual.dtype)


def _forget(state: SecantState, which: Tensor, *, spared: int = 0) -> None:
    """These samples lose their columns, but for the newest so many."""
    slots = state.system.shape[1]
    old = torch.nn.functional.pad(state.columns(), (0, slots - state.num_columns))
    new = torch.zeros(slots, dtype=torch.bool, device=old.device)
    for age in range(1, min(spared, state.num_columns) + 1):
        new[(state.count - age) % state.memory] = True
    state.alive = old & (new | ~which.unsqueeze(1))
    identity = torch.eye(slots, dtype=state.system.dtype, device=state.system.device)
    lost = (which.unsqueeze(1) & ~new).unsqueeze(1)
    in_place = not (is_recorded(state.system) or torch.compiler.is_compiling())
    out = {"out": state.system} if in_place else {}
    state.system = torch.where(lost | lost.mT, identity, state.system, **out)
    if state.products is not None:
        size = state.products.shape[1]
        state.products = torch.where(state.alive[:, :size], state.products, 0)
    state.lost_at = state.count


def _subtract(rows: Tensor, slot: int, value: Tensor, spared: Tensor | None) -> Tensor:
    """`rows` with `value` subtracted from one row, some samples spared."""
    if is_recorded(rows, value):
        old, new = rows[:, slot], rows[:, slot] - value
        return write_row(rows, slot, new if spared is None else torch.where(spared.unsqueeze(1), old, new))
    if spared is None:
        rows[:, slot].sub_(value)
    else:
        rows[:, slot].sub_(value.masked_fill(spared.unsqueeze(1), 0))
    return rows


def _put(
    rows: Tensor, value: Tensor, refused: Tensor | None, finished: Tensor | None, state: SecantState
) -> Tensor:
    """`rows` with the newest row replaced: finished samples keep theirs, refused ones what was pending."""
    slot = state.slot
    choices = []
    if refused is not None:
        choices.append((refused, rows[:, (state.count - 1) % state.memory]))
    if finished is not None and state.count >= state.memory:  # a new slot holds nothing to be kept
        choices.append((finished, rows[:, slot]))
    if len(choices) == 1 and not is_recorded(rows, value) and not torch.compiler.is_compiling():
        which, kept = choices[0]
        torch.where(which.unsqueeze(1), kept, value, out=rows[:, slot])
        return rows
    for which, kept in choices:
        value = torch.where(which.unsqueeze(1), kept, value)
    return write_row(rows, slot, value)


def _write_cross(state: SecantState, slot: int, row: Tensor, column: Tensor) -> Tensor:
    """The matrix with the first entries of one row and one column replaced; finished samples keep theirs."""
    matrix, size = state.system, row.shape[1]
    scale, shift = state.scale[:, slot, :size], state.shift[:, slot, :size]
    in_place = not (is_recorded(matrix, row, column) or torch.compiler.is_compiling())
    if in_place and state.finished is None:
        matrix[:, slot, :size] = row
        torch.addcmul(shift, column, scale, out=matrix[:, :size, slot])
        return matrix
    column = torch.addcmul(shift, column, scale)
    if state.finished is not None:
        spared = state.finished.unsqueeze(1)
        if in_place:
            torch.where(spared, matrix[:, slot, :size], row, out=matrix[:, slot, :size])
            torch.where(spared, matrix[:, :size, slot], column, out=matrix[:, :size, slot])
            return matrix
        row = torch.where(spared, matrix[:, slot, :size], row)
        column = torch.where(spared, matrix[:, :size, slot], column)
    if not is_recorded(matrix, row, column):
        matrix[:, slot, :size] = row
        matrix[:, :size, slot] = column
        return matrix
    rest = matrix.shape[1] - size
    row, column = (torch.nn.functional.pad(e.to(matrix.dtype), (0, rest)) for e in (row, column))
    return write_row(write_row(matrix, slot, row).mT, slot, column).mT

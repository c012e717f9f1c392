"""What a secant method remembers: differences of images and of a second quantity, a column for each step.

With dF the differences of f-values that are kept, a secant method takes z <- f(z) - dF gamma. A second set of
columns, `left`, holds the differences of residuals or of iterates at the same steps; with it the small system
is made that gives gamma (`system.py`).

A column is made in place. Its slot first holds the values at an iterate, which are *pending*; when the next
iterate arrives, its values are subtracted. So m columns take 2 m states, and nothing else of the past is
kept. A column is therefore the older value minus the newer one; this sign does not matter as long as both
sets have it. Slots are added as they are needed. When there are as many as `memory`, the newest column takes
the place of the oldest.

Samples need not have the same columns: one that begins a new history drops those it had, and one that is
finished keeps its own while the slots of the others are written again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import combination, inner_products, is_recorded, with_room, write_row
from .system import Equations, SmallSystem


@dataclass(eq=False)
class History:
    """The columns of a batch. A step changes it in place."""

    memory: int  # most columns kept
    df: Tensor  # (B, slots, D), differences of f-values
    left: Tensor  # (B, slots, D), differences of residuals or of iterates
    system: SmallSystem
    count: int = 0  # columns made so far
    pending: bool = False  # whether the slot after those holds the values at the iterate before
    valid: Tensor | None = None  # (B, slots), bool, columns that each sample has; None: all have all
    dropped_at: int | None = None  # `count` when a sample last dropped its columns; None: never
    finished: Tensor | None = None  # (B,), bool, samples whose columns stay as they are; None: nobody
    moving: Tensor | None = None  # (B, 1), 0 for the finished samples, else 1; None: all are 1
    ended: Tensor | None = None  # (B,), int64, `count` + 1 when a sample finished, else 0; None: all are 0

    @classmethod
    def empty(
        cls,
        equations: Equations,
        states: Tensor,  # (B, D), tells batch, width, type and device
        memory: int,
    ) -> History:
        """No columns."""
        df, left = (states.new_zeros(states.shape[0], 0, states.shape[1]) for _ in range(2))
        return cls(memory, df, left, SmallSystem.empty(equations, states, 0))

    @property
    def uses_residuals(self) -> bool:
        """Whether `left` holds differences of residuals; else it holds those of iterates."""
        return self.system.equations.uses_residuals

    @property
    def slot(self) -> int:
        """Where the pending values lie, or will lie."""
        return self.count % self.memory

    @property
    def newest(self) -> int:
        """Where the newest column lies."""
        return (self.count - 1) % self.memory

    @property
    def num_columns(self) -> int:
        """Slots that hold columns, or the pending values in the place of the oldest one."""
        return min(self.count, self.memory)

    @property
    def has_gaps(self) -> bool:
        """Whether a sample that is not finished may lack columns that others have."""
        return self.dropped_at is not None and self.count - self.dropped_at < self.memory

    def columns(self) -> Tensor:
        """Which columns each sample has, the pending values left out, bool, (B, `num_columns`)."""
        size = self.num_columns
        if self.valid is not None:
            return self.valid[:, :size]
        found = torch.ones(self.df.shape[0], size, dtype=torch.bool, device=self.df.device)
        if self.pending and self.slot < size:
            found[:, self.slot] = False
        return found

    def own_columns(self) -> Tensor:
        """The same, bool, (B, slots), kept for each sample from now on."""
        if self.valid is None:
            self.valid = self._padded(self.columns())
        return self.valid

    def oldest_first(self) -> Tensor:
        """Slots of each sample's columns by age, int64, (B, `num_columns`).

        The slots that hold no column of the sample come first. How many these are depends on the rest of the
        batch, as `num_columns` does; the order of the sample's own does not.
        """
        size, valid = self.num_columns, self.columns()
        counts = torch.full_like(valid[:, :1], self.count, dtype=torch.int64)
        if self.ended is not None:
            ended = self.ended.unsqueeze(1)
            counts = torch.where(ended > 0, ended - 1, counts)
        places = torch.arange(size, device=valid.device)
        order = (counts - size + places) % max(size, 1)
        ranks = valid.gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices
        return order.gather(1, ranks)

    # Which samples take part ----------------------------------------------------------------------------

    def freeze(
        self,
        finished: Tensor | None,  # (B,), bool, the same tensor until more samples are; None: nobody
    ) -> None:
        """From now on the columns of finished samples stay as they are, and those of all others go on."""
        if finished is self.finished:
            return
        self.finished, self.moving = finished, None
        if finished is None:
            return
        ended = torch.zeros_like(finished, dtype=torch.int64) if self.ended is None else self.ended
        self.ended = torch.where(finished & (ended == 0), self.count + 1, ended)
        self.moving = (~finished).to(self.df.dtype).unsqueeze(1)
        self.own_columns()

    def drop(
        self,
        which: Tensor,  # (B,), bool
        *,
        spared: int = 0,
    ) -> None:
        """These samples lose all columns but the newest so many, and begin a new history."""
        old = self._padded(self.columns())
        new = torch.zeros(old.shape[1], dtype=torch.bool, device=old.device)
        for age in range(1, min(spared, self.num_columns) + 1):
            new[(self.count - age) % self.memory] = True
        self.valid = old & (new | ~which.unsqueeze(1))
        self.system.drop(which.unsqueeze(1) & ~new, self.valid)
        self.dropped_at = self.count

    def without_columns(self) -> Tensor | None:
        """The samples that have just dropped all columns, bool (B,); `None`: nobody has."""
        if self.valid is None or self.dropped_at != self.count:
            return None
        return ~self.valid[:, : self.num_columns].any(1)

    def _padded(self, columns: Tensor) -> Tensor:
        """Columns (B, `num_columns`) as (B, slots)."""
        return torch.nn.functional.pad(columns, (0, self.df.shape[1] - columns.shape[1]))

    # What a step does, in this order --------------------------------------------------------------------

    def close(
        self,
        fz: Tensor,  # (B, D)
        source: Tensor,  # (B, D), the residual or the iterate, whichever `left` is made of
        residual: Tensor,  # (B, D)
        refused: Tensor | None,  # (B,), bool, samples that undo their last step: what is pending stays
    ) -> None:
        """Make a column of the pending values, and bring the small system up to date with the residual."""
        is_new = self.pending
        if is_new:
            self._subtract(fz, source, refused)
        rhs = inner_products(self.left[:, : self.num_columns], residual) if self.count else None
        if rhs is not None and self.valid is not None and self.has_gaps:
            rhs = torch.where(self.valid[:, : rhs.shape[1]], rhs, 0)
        if is_new and rhs is not None:
            slot = self.newest
            left = self.left[:, slot]
            change = left if self.uses_residuals else self.df[:, slot] - left
            self._extend(slot, self.system.column(rhs, slot, left, change))
        self.system.rhs = rhs

    def _subtract(self, fz: Tensor, source: Tensor, refused: Tensor | None) -> None:
        """Turn the pending values into a column of the samples that are not finished."""
        slot, finished, moving = self.slot, self.finished, self.moving
        if refused is None and moving is not None and not is_recorded(self.df, fz):
            self.df[:, slot].addcmul_(fz, moving, value=-1)
            self.left[:, slot].addcmul_(source, moving, value=-1)
        else:
            spared = finished if refused is None or finished is None else finished | refused
            spared = refused if spared is None else spared
            self.df = _subtracted(self.df, slot, fz, spared)
            self.left = _subtracted(self.left, slot, source, spared)
        self.count, self.pending = self.count + 1, False
        if self.valid is not None:
            # Autograd may have saved it, in which case it must not be written to.
            valid = self.valid.clone() if is_recorded(self.df) else self.valid
            if finished is None:
                valid[:, slot].fill_(True)
            else:
                valid[:, slot].logical_or_(~finished)
            self.valid = valid

    def _extend(self, newest: int, column: Tensor) -> None:
        """Add the row and the column of the newest column to the matrix."""
        size = column.shape[1]
        row = self.system.equations.row(self.left[:, :size], self.df[:, :size], newest, column)
        if row is not column and self.valid is not None and self.has_gaps:
            row = torch.where(self.valid[:, :size], row, 0)
        self.system.write(newest, row, column, self.finished)

    def make_room(self) -> None:
        """Provide a slot for the values of this iterate, which the next column will be made of."""
        slots, slot = self.df.shape[1], self.slot
        if slot < slots:
            if self.valid is not None and self.count >= self.memory:  # the oldest column gives its slot away
                valid = self.valid.clone() if is_recorded(self.df) else self.valid
                if self.finished is None:
                    valid[:, slot].fill_(False)
                else:
                    valid[:, slot].logical_and_(self.finished)
                self.valid = valid
            return
        self.provide(slot)

    def provide(self, slot: int) -> None:
        """Make more slots, at least up to this one, unless it is there."""
        if slot < self.df.shape[1]:
            return
        self.df = with_room(self.df, slot, self.memory)
        self.left = with_room(self.left, slot, self.memory)
        self.system.grow(self.df[:, 0], self.df.shape[1])
        if self.valid is not None:
            self.valid = self._padded(self.valid)

    def put_left(self, source: Tensor, refused: Tensor | None) -> None:
        """Put the residual or the iterate, whichever `left` is made of, into the slot that was provided."""
        self.left = self._put(self.left, source, refused)

    def put_images(self, fz: Tensor, refused: Tensor | None) -> None:
        """Put f(z) there, after `put_left`; then both are pending."""
        self.df = self._put(self.df, fz, refused)
        self.pending = True

    def _put(self, rows: Tensor, value: Tensor, refused: Tensor | None) -> Tensor:
        """`rows` with the pending row replaced.

        Finished samples keep the column there, refused ones go back to what was pending before.
        """
        slot = self.slot
        choices = []
        if refused is not None:
            choices.append((refused, rows[:, self.newest]))
        if self.finished is not None and self.count >= self.memory:  # a new slot holds nothing to be kept
            choices.append((self.finished, rows[:, slot]))
        if len(choices) == 1 and not is_recorded(rows, value) and not torch.compiler.is_compiling():
            which, kept = choices[0]
            torch.where(which.unsqueeze(1), kept, value, out=rows[:, slot])
            return rows
        for which, kept in choices:
            value = torch.where(which.unsqueeze(1), kept, value)
        return write_row(rows, slot, value)

    # What is made of it ---------------------------------------------------------------------------------

    def combined(
        self,
        fz: Tensor,  # (B, D)
        gamma: Tensor,  # (B, columns)
    ) -> Tensor:
        """f(z) - dF gamma, (B, D)."""
        size = gamma.shape[1]
        if size == 0:
            return fz
        return torch.baddbmm(fz.unsqueeze(1), gamma.unsqueeze(1), self.df[:, :size], alpha=-1).squeeze(1)

    def remaining(
        self,
        residual: Tensor,  # (B, D)
        gamma: Tensor,  # (B, columns)
    ) -> Tensor:
        """r - dR gamma, (B, D): what the combination leaves of the residual."""
        size = gamma.shape[1]
        if size == 0:
            return residual
        if self.uses_residuals:
            return residual - combination(gamma, self.left[:, :size])
        # dR = dF - dZ
        return residual - combination(gamma, self.df[:, :size]) + combination(gamma, self.left[:, :size])

    def half_step(self) -> Tensor:
        """Half a Picard step (B, D) from the iterate whose values are pending."""
        fz, source = self.df[:, self.slot], self.left[:, self.slot]
        return torch.add(fz, source, alpha=-0.5) if self.uses_residuals else torch.lerp(fz, source, 0.5)

    def transposed(
        self,
        g: Tensor,  # (B, D)
    ) -> Tensor:
        """-B^T g (B, D), with B the estimate of (J - I)^-1 that the steps z <- z - B r amount to.

        z - B r = f(z) - dF M^-1 left^T r, so -B^T g = g - left M^-T dF^T g. Pending values are left out;
        samples without columns, or whose system is singular, get g. The history is left as it is.
        """
        size = self.num_columns
        if size == 0:
            return g
        return g - self.system.transposed(g, self.df[:, :size], self.left[:, :size], self.columns())

    def adopt(self, old: History) -> None:
        """Go on with the newest columns of another history, as many as there is room for.

        Pending values belong to the old map and are not taken over. This history must be empty, and of
        states of the same shape and type; the other may be of another method.
        """
        slots = old.oldest_first()[:, -self.memory :]
        kept = slots.shape[1]
        df, left = (rows.detach().take_along_dim(slots.unsqueeze(2), 1) for rows in (old.df, old.left))
        # What a sample dropped or blew up must not come back: a coefficient of zero does not silence NaN.
        valid = old.columns().gather(1, slots) & (df.sum(2) + left.sum(2)).isfinite()
        df, left = (torch.where(valid.unsqueeze(2), columns, 0) for columns in (df, left))
        if old.uses_residuals != self.uses_residuals:
            left = df - left  # differences of residuals and of iterates add up to those of f-values
        self.df, self.left, self.count = df, left, kept
        self.valid, self.dropped_at = valid, 0
        equations = self.system.equations
        self.system = SmallSystem.empty(equations, df.new_empty(len(df), 0), kept)
        if type(old.system.equations) is type(equations):
            known = valid.unsqueeze(1) & valid.unsqueeze(2)
            matrix = old.system.matrix.take_along_dim(slots.unsqueeze(2), 1)
            matrix = matrix.take_along_dim(slots.unsqueeze(1), 2)
            self.system.matrix = torch.where(known, matrix, self.system.matrix)
            return
        self.system.matrix = self.system.matrix.clone()
        for newest in range(kept):
            known = left[:, : newest + 1]
            change = left[:, newest] if self.uses_residuals else df[:, newest] - left[:, newest]
            self._extend(newest, inner_products(known, change))


def _subtracted(rows: Tensor, slot: int, value: Tensor, spared: Tensor | None) -> Tensor:
    """`rows` with `value` subtracted from one row, some samples spared."""
    if is_recorded(rows, value):
        old, new = rows[:, slot], rows[:, slot] - value
        return write_row(rows, slot, new if spared is None else torch.where(spared.unsqueeze(1), old, new))
    if spared is None:
        rows[:, slot].sub_(value)
    else:
        rows[:, slot].sub_(value.masked_fill(spared.unsqueeze(1), 0))
    return rows

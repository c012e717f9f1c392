"""The small system of a secant method, M gamma = left^T r, which gives the coefficients of its step.

`left` holds one column for each difference that the method remembers (`history.py`), and r is the residual.
What M is made of is the method's `Equations`. The matrix is kept from step to step: a new column of the
history adds a row and a column to M.

Samples need not have the same columns. In M, the rows and columns of those that a sample lacks are those of
the identity, and the right side is zero there, so their coefficients are zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..state import small_dtype
from .base import combination, inner_products, is_recorded, solve_small, write_row


@dataclass(frozen=True)
class Equations(ABC):
    """What a secant method puts into its small system. A history of one method is told from others by it.

    Attributes:
        ridge: regularisation of the diagonal, at least 0. Where `left` is made of residuals the diagonal is
            positive, and the ridge is relative to it. Elsewhere dZ^T dR may be zero where the column is not,
            and the ridge is relative to the squared length of dZ.
        uses_residuals: whether `left` holds differences of residuals; else it holds those of iterates.
        subtracts: where it holds those of iterates, whether a new row is that of dZ^T dR = dZ^T (dF - dZ),
            else that of dZ^T dF.
    """

    ridge: float = 0.0
    uses_residuals: ClassVar[bool]
    subtracts: ClassVar[bool] = False

    @abstractmethod
    def row(
        self,
        left: Tensor,  # (B, m, D)
        df: Tensor,  # (B, m, D)
        newest: int,
        column: Tensor,  # (B, m), left^T dr, what the newest difference of residuals dr adds as a column
    ) -> Tensor:
        """The row (B, m) that the newest difference adds; `column` itself where M is symmetric.

        Its entry on the diagonal is not used.
        """

    @property
    def diagonal_factor(self) -> float:
        """What each new entry of the diagonal is multiplied by."""
        return 1 + self.ridge if self.uses_residuals else 1.0

    def diagonal(
        self,
        left: Tensor,  # (B, D), the newest column
        change: Tensor,  # (B, D), that of the residual
    ) -> Tensor:
        """The entry (B,) of the diagonal for the newest column, before `diagonal_factor`."""
        entry = inner_products(left.unsqueeze(1), change).squeeze(1)
        if self.uses_residuals or self.ridge == 0:
            return entry
        # dZ^T dR is negative for a contraction, where r = f(z) - z falls as z rises.
        return entry - self.ridge * inner_products(left.unsqueeze(1), left).squeeze(1)

    def largest_coefficient(self, dtype: torch.dtype) -> float:
        """From which size of a coefficient on the system counts as singular, for states of this type."""
        # Columns carry rounding errors, and gamma enlarges them: beyond this they are all that is left.
        limit = float(3 * torch.finfo(dtype).eps ** -0.5)
        if self.uses_residuals or self.ridge == 0:
            return limit
        # Also below what the ridge alone would give, where residuals do not change with the iterate.
        return min(limit, 0.1 / self.ridge)


@dataclass(eq=False)
class SmallSystem:
    """The matrix M of a batch, with room for as many columns as the history has slots. Changed in place."""

    equations: Equations
    matrix: Tensor  # (B, slots, slots)
    scale: Tensor  # (B, slots, slots), what a new column of the matrix is multiplied by
    shift: Tensor  # (B, slots, slots), and what is added to it, to keep its diagonal away from zero
    rhs: Tensor | None = None  # (B, columns), left^T r at the last step; None: there was no column

    @classmethod
    def empty(
        cls,
        equations: Equations,
        states: Tensor,  # (B, D), tells batch, type and device
        slots: int,
    ) -> SmallSystem:
        """Room for so many columns, none of which any sample has."""
        dtype = small_dtype(states)
        identity = torch.eye(slots, dtype=dtype, device=states.device).expand(states.shape[0], slots, slots)
        # The shift is for samples at rest, whose columns are zero.
        scale = 1 + (equations.diagonal_factor - 1) * identity[:1]
        shift = -torch.finfo(dtype).tiny * identity[:1]
        return cls(equations, identity, scale.expand_as(identity), shift.expand_as(identity))

    def grow(
        self,
        states: Tensor,  # (B, D)
        slots: int,
    ) -> None:
        """Make room for so many columns."""
        old, larger = self.matrix, SmallSystem.empty(self.equations, states, slots)
        matrix = larger.matrix.clone()
        matrix[:, : old.shape[1], : old.shape[1]] = old
        self.matrix, self.scale, self.shift = matrix, larger.scale, larger.shift

    def drop(
        self,
        lost: Tensor,  # (B, slots), bool, columns that samples lose now
        valid: Tensor,  # (B, slots), bool, columns that they have after that
    ) -> None:
        """Put the identity, and zero on the right side, where samples have no columns any more."""
        slots, lost = self.matrix.shape[1], lost.unsqueeze(1)
        identity = torch.eye(slots, dtype=self.matrix.dtype, device=self.matrix.device)
        in_place = not (is_recorded(self.matrix) or torch.compiler.is_compiling())
        out = {"out": self.matrix} if in_place else {}
        self.matrix = torch.where(lost | lost.mT, identity, self.matrix, **out)
        if self.rhs is not None:
            self.rhs = torch.where(valid[:, : self.rhs.shape[1]], self.rhs, 0)

    def column(
        self,
        rhs: Tensor,  # (B, columns), left^T r now
        slot: int,
        left: Tensor,  # (B, D), the newest column, in that slot
        change: Tensor,  # (B, D), that of the residual
    ) -> Tensor:
        """left^T dr (B, columns) for the newest column, without going through the history again.

        For older columns it is the change of left^T r since the step before. For the newest the entry is
        computed, since the two values may be nearly the same there.
        """
        entry, before, size = self.equations.diagonal(left, change), self.rhs, rhs.shape[1]
        if before is None:
            return entry.unsqueeze(1)
        older = before - rhs[:, : before.shape[1]]
        if is_recorded(older, entry):
            return torch.cat([older[:, :slot], entry.unsqueeze(1), older[:, slot + 1 :]], 1)[:, :size]
        if slot < older.shape[1]:
            older[:, slot] = entry
            return older
        return torch.cat([older, entry.unsqueeze(1)], 1)

    def write(
        self,
        slot: int,
        row: Tensor,  # (B, columns)
        column: Tensor,  # (B, columns)
        finished: Tensor | None,  # (B,), bool, samples whose matrix stays as it is; None: nobody
    ) -> None:
        """Put the row and the column of a column of the history into the matrix."""
        matrix, size = self.matrix, row.shape[1]
        scale, shift = self.scale[:, slot, :size], self.shift[:, slot, :size]
        in_place = not (is_recorded(matrix, row, column) or torch.compiler.is_compiling())
        if in_place and finished is None:
            matrix[:, slot, :size] = row
            torch.addcmul(shift, column, scale, out=matrix[:, :size, slot])
            return
        column = torch.addcmul(shift, column, scale)
        if finished is not None:
            spared = finished.unsqueeze(1)
            if in_place:
                torch.where(spared, matrix[:, slot, :size], row, out=matrix[:, slot, :size])
                torch.where(spared, matrix[:, :size, slot], column, out=matrix[:, :size, slot])
                return
            row = torch.where(spared, matrix[:, slot, :size], row)
            column = torch.where(spared, matrix[:, :size, slot], column)
        if not is_recorded(matrix, row, column):
            matrix[:, slot, :size] = row
            matrix[:, :size, slot] = column
            return
        rest = matrix.shape[1] - size
        row, column = (torch.nn.functional.pad(e.to(matrix.dtype), (0, rest)) for e in (row, column))
        self.matrix = write_row(write_row(matrix, slot, row).mT, slot, column).mT

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """gamma (B, columns) in the type of the states, and the samples whose system is singular.

        Those, bool (B,), get zeros; `None`: nobody. There must be a right side.
        """
        assert self.rhs is not None
        size, rhs = self.rhs.shape[1], self.rhs.to(self.matrix.dtype)
        limit = self.equations.largest_coefficient(dtype)
        gamma, singular = solve_small(self.matrix[:, :size, :size], rhs, limit=limit)
        return gamma.to(dtype), singular

    def transposed(
        self,
        g: Tensor,  # (B, D)
        df: Tensor,  # (B, m, D)
        left: Tensor,  # (B, m, D)
        valid: Tensor,  # (B, m), bool, the columns that count
    ) -> Tensor:
        """left M^-T df^T g, (B, D); zero for samples without columns or with a singular system."""
        size = df.shape[1]
        rhs = inner_products(df, g).to(self.matrix.dtype)
        identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        known = valid.unsqueeze(1) & valid.unsqueeze(2)
        matrix = torch.where(known, self.matrix[:, :size, :size].mT, identity)
        coefficients, _ = solve_small(matrix, torch.where(valid, rhs, 0))
        # What a sample lost may not be finite, and a coefficient of zero does not silence NaN.
        left = torch.where(valid.unsqueeze(2), left, 0)
        return combination(coefficients.to(g.dtype), left)

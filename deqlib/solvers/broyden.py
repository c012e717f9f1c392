"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._checks import settle_numbers
from .base import inner_products
from .secant import SecantSolver, check_secant
from .system import Equations


@dataclass(frozen=True)
class BroydenEquations(Equations):
    """(dZ^T dR + L) gamma = dZ^T r, with L the part of dZ^T dZ whose row is newer than its column."""

    uses_residuals: ClassVar[bool] = False

    def row(self, left: Tensor, df: Tensor, newest: int, column: Tensor) -> Tensor:
        """dZ^T dR + dZ^T dZ = dZ^T dF, since the row is newer than all columns but its own."""
        return inner_products(df, left[:, newest])


@dataclass(frozen=True, kw_only=True)
class Broyden(SecantSolver):
    """Broyden's "good" method, in compact form, with safeguards.

    With r(z) = f(z) - z and B an estimate of (J - I)^-1, B = -I at first: z <- z - B r, then
    B <- B + (dz - B dr) dz^T B / (dz^T B dr) (Broyden 1965, Math. Comp. 19). The updates of the last
    `memory` pairs, applied in order, are kept in compact form
    (Byrd, Nocedal & Schnabel 1994, Math. Programming 63, theorem 6.1, inverted):
    B r = -r + dF (dZ^T dR + L)^-1 dZ^T r, with L the strictly lower triangle, newer row and older column,
    of dZ^T dZ. When the memory is full the oldest pair leaves and what remains is exactly the method run
    on the remaining pairs, so the newest secant equation B dr = dz always holds.

    Costs three products with the history, O(memory * D), a step. Memory: as `Anderson`.
    Reaches fixed points that repel Picard.

    Args:
        memory: most pairs kept, and never more than twice the numbers of a sample; taken as they are needed.
        growth: as in `Anderson`.
        restart: as in `Anderson`.
    """

    memory: int = 120
    growth: float = 1e4
    restart: int | None = None

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_secant("Broyden", self.memory, self.growth, self.restart)

    @property
    def equations(self) -> Equations:
        """Those of Broyden's method in compact form."""
        return BroydenEquations()

    @property
    def damping(self) -> float:
        """Steps are undamped."""
        return 1.0

    def most_columns(self, width: int) -> int:
        """On affine maps of `width` unknowns the method ends after twice as many steps (Gay 1979)."""
        return 2 * max(width, 1)

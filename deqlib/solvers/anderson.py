"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._checks import check_choice, check_integer, check_number, settle_numbers
from .base import inner_products
from .secant import SecantSolver, check_secant
from .system import Equations

_FEWEST = 10  # differences that the budget does not forbid


@dataclass(frozen=True)
class TypeII(Equations):
    """dR^T dR gamma = dR^T r, the normal equations of the least-squares problem."""

    uses_residuals: ClassVar[bool] = True

    def row(self, left: Tensor, df: Tensor, newest: int, column: Tensor) -> Tensor:
        """The matrix is symmetric."""
        return column


@dataclass(frozen=True)
class TypeI(Equations):
    """dZ^T dR gamma = dZ^T r."""

    uses_residuals: ClassVar[bool] = False
    subtracts: ClassVar[bool] = True

    def row(self, left: Tensor, df: Tensor, newest: int, column: Tensor) -> Tensor:
        """Of dZ^T dR = dZ^T dF - dZ^T dZ."""
        return inner_products(df, left[:, newest]) - inner_products(left, left[:, newest])


@dataclass(frozen=True, kw_only=True)
class Anderson(SecantSolver):
    """Anderson acceleration in difference form, with safeguards.

    With dR, dF and dZ the last `memory` differences of residuals, f-values and iterates, type II takes
    gamma = argmin ||r - dR gamma||, type I the gamma for which dZ^T (r - dR gamma) = 0, and both
    z <- f(z) - dF gamma - (1 - damping) (r - dR gamma).
    (Walker & Ni 2011, SIAM J. Numer. Anal. 49(4), equations 2.1 to 2.3; type I: Fang & Saad 2009, Numer.
    Linear Algebra Appl. 16.)

    The matrix of inner products is kept, and a step computes one new row of it: the cost is
    O(memory * D), two passes over the history. Memory: 2 * `memory` states, taken as they are needed, half as
    much again while room is made, and at most 4 more while a solve runs, 7 with damping.

    Args:
        memory: most differences kept, and never more than a sample has numbers, plus one.
        budget: most numbers of a sample that the kept differences of residuals may have together, and those
            of f-values as many again; `None`: any. Of a large sample fewer differences are kept then, since
            all are read at every step, but never fewer than 10 if `memory` allows those.
        ridge: added to the diagonal of the least-squares system after its columns were scaled to unit
            norm, so it means the same at every size of the residual.
        damping: in (0, 1], of the residual that the combination leaves.
        kind: "II" or "I".
        growth: an accelerated step whose residual exceeds the sample's best by this factor is refused:
            the sample takes half a Picard step from the iterate before and begins a new history.
            Infinity never refuses.
        restart: every so many steps, a sample whose best residual did not improve since the last time
            begins a new history; `None` never does.
    """

    memory: int = 10
    budget: int | None = None
    ridge: float = 1e-7
    damping: float = 1.0
    kind: Literal["I", "II"] = "II"
    growth: float = 10.0
    restart: int | None = 25

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_secant("Anderson", self.memory, self.growth, self.restart)
        if self.budget is not None:
            check_integer("Anderson", 1, budget=self.budget)
        check_number("Anderson", 0, ridge=self.ridge)
        check_number("Anderson", 0, 1, open_minimum=True, damping=self.damping)
        check_choice("Anderson", ("I", "II"), kind=self.kind)

    @property
    def equations(self) -> Equations:
        """Those of type I or II."""
        return TypeII(self.ridge) if self.kind == "II" else TypeI(self.ridge)

    def most_columns(self, width: int) -> int:
        """As many as a sample has numbers (`width`), within the budget, and one for the pending values."""
        most = max(width, 1) + 1
        return most if self.budget is None else min(most, max(self.budget // max(width, 1), _FEWEST))

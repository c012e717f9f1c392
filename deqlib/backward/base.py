"""The contract of a backward mode.

A mode wraps the whole solve: it decides what runs on autograd's tape. Most modes solve off the tape, evaluate
the map once more on it at the fixed point, and return the fixed point with that evaluation's graph behind it.
The value is therefore the same in every mode, with and without gradients, and the residual that the solution
reports is that of its value. The pieces for that are in `tape.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from .._settings import Settings
from ..confirmation import Confirm
from ..solution import Solution
from ..solvers import Solver
from ..state import FlatMap, Map
from ..steps import Course
from ..stopping import Stopping


class Solve(Protocol):
    """The driver with the caller's settings filled in: once for the fixed point, then for its derivatives."""

    @property
    def stopping(self) -> Stopping:
        """The caller's rule."""

    def __call__(
        self, f: Map, z0: Tensor, *, stopping: Stopping | None = None, course: Course | None = None
    ) -> Solution:
        """The fixed point of `f` from `z0` (B, D), by the caller's solver, `state` and `compact`.

        Args:
            f: the map that the mode was given, or one that stands for it.
            z0: starting point.
            stopping: rule of this solve; default the caller's.
            course: in place of a rule: a fixed number of steps for each sample.

        Raises:
            NonConvergenceError: the solve failed, and the caller wants to know.
        """

    def unconfirmed(self, f: Map, z0: Tensor) -> tuple[Solution, Confirm]:
        """The fixed point as above, for a mode that evaluates `f` at the value of the solution anyway.

        Returns:
            What was found, and a function to be called with that evaluation, (B, D): it returns the solution,
            whose status and residuals are settled by it if nothing settled them before.

        Raises:
            NonConvergenceError: as above; also from the function.
        """

    def linear(
        self, f: Map, start: Tensor, *, solver: Solver, stopping: Stopping, name: str = "adjoint solve"
    ) -> Solution:
        """A linear problem that a derivative leads to, such as the adjoint u = J^T u + g.

        It begins afresh and sees the whole batch, whatever the caller asked of the forward solve.

        Args:
            f: u -> J^T u + g, (B, D) to (B, D).
            start: (B, D); g is a good one.
            solver: the method.
            stopping: the rule; a tolerance bounds the relative error of the gradient.
            name: of the solve, in the message where it fails.

        Raises:
            NonConvergenceError: the solve failed, and the caller wants to know.
        """


class Backward(Settings, ABC):
    """How gradients pass through a solve. Subclasses are frozen, keyword-only dataclasses."""

    def check(self, solver: Solver, stopping: Stopping) -> None:
        """Called before anything is solved. Default: any settings will do.

        Args:
            solver: of the forward solve.
            stopping: its rule.

        Raises:
            ValueError: the mode does not work with these.
        """

    @property
    def is_traceable(self) -> bool:
        """Whether `torch.compile` can look into a recorded solve of a fixed number of steps."""
        return False

    @property
    def is_traceable_in_transforms(self) -> bool:
        """Whether it can under a transform of `torch.func` and in forward mode, recorded or not."""
        return False

    @abstractmethod
    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve for the fixed point and attach the gradient to its value.

        Args:
            f: the map, (B, D) to (B, D).
            z0: starting point, (B, D).
            solve: see `Solve`.

        Returns:
            The solution of `solve`, its value (B, D) carrying gradient where autograd records, and the
            evaluations made on the tape added to `nfe`.
        """

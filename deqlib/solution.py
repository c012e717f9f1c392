"""What a solve returns, and what happens when it fails."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._torch import tree_map
from .samples import detached

OnFailure = Literal["raise", "warn", "ignore"]


class Status(IntEnum):
    """How a sample's solve ended."""

    CONVERGED = 0  # met the tolerance
    MAX_STEPS = 1  # ran out of steps
    STALLED = 2  # its best residual stopped improving
    DIVERGED = 3  # residual not finite, or far above its best
    COMPLETED = 4  # took the fixed number of steps asked for; no tolerance to meet
    COUPLED = 5  # met the tolerance while others moved, and does not for the batch as it is returned

    @property
    def is_failure(self) -> bool:
        """Whether the failure policy applies."""
        return self in _ADVICE


_ADVICE = {
    Status.MAX_STEPS: "raise Stopping.max_steps, loosen rtol, or use a faster solver such as Auto()",
    Status.STALLED: (
        "loosen rtol (the cell's precision may not reach it), raise Stopping.patience, or use Auto(), which "
        "tries several methods"
    ),
    Status.DIVERGED: (
        "make the cell contractive (normalise it, scale its weights down), use damping, "
        "or look for NaN in its inputs"
    ),
    Status.COUPLED: (
        "they met the tolerance while others moved, and do not as the batch is returned: samples seem to "
        "depend on one another (a state without a batch axis? nodes of a graph as samples? BatchNorm or "
        "attention over the batch? a cell that draws random numbers?); make what belongs together one sample "
        "by a batch axis, z0[None], or keep samples apart"
    ),
}


@dataclass(frozen=True, eq=False)  # fields are tensors, which have no single truth value to compare by
class Solution:
    """Fixed points of a batch, with what is known about each.

    A pickle and a deep copy hold the numbers and not the graphs behind them.

    Attributes:
        value: best iterate seen, structure and dtypes of the starting point; carries gradient if the
            solve was differentiated.
        residual: `||f(z) - z||` at `value`, shape (B,), by the last evaluation there; `None` if not measured.
        relative_residual: `||f(z) - z|| / ||f(z)||` at `value`, shape (B,); `None` if not measured.
        num_steps: solver steps each sample took, int64, shape (B,).
        status: `Status` codes, int64, shape (B,).
        nfe: evaluations of the cell on the batch, those on the tape included.
        sample_nfe: evaluations each sample took part in, int64, shape (B,); fewer than `nfe` where finished
            samples left the batch (`compact`). Their sum is the work of the cell.
        trace: relative residual at every evaluation of the loop, shape (evaluations, B); rows after a
            sample ended repeat it at its value. `None` if not measured, and where it would be many times what
            the states are: with fewer than 8 numbers a sample and more than 2^20 in `max_steps` + 1 rows.
        method: which of `methods` worked on each sample last, int64, shape (B,).
        methods: the solver's name, or those of the methods it tries in turn; a name may come twice.
        rejections: by cause, how many steps of each sample were refused, int64, shape (B,).
        state: the solver's last state; given to another solve it goes on with what was learnt. `None` where
            the solve ran under `torch.func` transforms.
    """

    value: Any
    residual: Tensor | None
    relative_residual: Tensor | None
    num_steps: Tensor
    status: Tensor
    nfe: int
    sample_nfe: Tensor
    trace: Tensor | None
    method: Tensor
    methods: tuple[str, ...]
    rejections: dict[str, Tensor]
    state: Any

    @property
    def converged(self) -> Tensor:
        """Which samples met the tolerance, bool, shape (B,)."""
        return self.status == Status.CONVERGED

    def counts(self) -> dict[Status, int]:
        """How many samples ended with each status; absent statuses are left out."""
        codes, numbers = torch.unique(self.status, return_counts=True)
        return {Status(code): number for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)}

    def method_counts(self) -> dict[str, int]:
        """How many samples each method worked on last; methods without any are left out."""
        counts: dict[str, int] = {}
        for code, number in enumerate(torch.bincount(self.method, minlength=1).tolist()):
            if number:
                name = self.methods[code]
                counts[name] = counts.get(name, 0) + number
        return counts

    def __getstate__(self) -> dict[str, Any]:
        """Without graphs, which can be neither pickled nor copied."""
        rest = {name: detached(known) for name, known in self.__dict__.items() if name != "value"}
        cut = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self.value)
        return {"value": cut, **rest}

    def __copy__(self) -> Solution:
        """The same tensors, graphs and all."""
        return replace(self)

    def __repr__(self) -> str:
        parts = [f"{number} {status.name.lower()}" for status, number in self.counts().items()]
        text = f"Solution({', '.join(parts) or 'no samples'}; nfe={self.nfe}"
        if self.num_steps.numel():
            low, high = int(self.num_steps.min()), int(self.num_steps.max())
            text += f", steps={low}" if low == high else f", steps={low}..{high}"
            if self.relative_residual is not None:
                text += f", worst relative residual={float(self.relative_residual.max()):.1e}"
        if int(self.method.max() if self.method.numel() else 0) > 0:
            text += ", by " + ", ".join(f"{name} {n}" for name, n in self.method_counts().items())
        return text + ")"


class NonConvergenceWarning(UserWarning):
    """A solve ended without meeting its tolerance; the best iterate was returned."""


class NonConvergenceError(RuntimeError):
    """A solve ended without meeting its tolerance.

    Attributes:
        message: what failed, by status, and what to try.
        solution: what was reached, its value the best iterate of every sample.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        """With both arguments: an error that a process raises must reach the one that waits for it."""
        return type(self), (str(self), self.solution), self.__dict__


def check_on_failure(owner: str, on_failure: str) -> None:
    """Raise `ValueError` unless `on_failure` names a policy."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"{owner}: on_failure must be one of {get_args(OnFailure)}, got {on_failure!r}")


def report_failure(solution: Solution, on_failure: OnFailure, what: str) -> None:
    """Apply the failure policy to a finished solve.

    Args:
        solution: what was found; nothing is done if no sample failed.
        on_failure: the policy.
        what: name of the solve, in the message.

    Raises:
        NonConvergenceError: a sample failed, and the policy is "raise".
    """
    if on_failure == "ignore":
        return
    counts = {status: n for status, n in solution.counts().items() if status.is_failure}
    if not counts:
        return
    total = solution.status.numel()
    reasons = ", ".join(f"{n} {status.name}" for status, n in counts.items())
    assert solution.relative_residual is not None  # a failure status implies a measured residual
    worst = float(solution.relative_residual.max())
    advice = "; ".join(f"{status.name}: {_ADVICE[status]}" for status in counts)
    message = (
        f"{what}: {sum(counts.values())} of {total} samples did not converge ({reasons}), "
        f"worst relative residual {worst:.1e} after {solution.nfe} evaluations; the best iterate is kept. "
        f"What to try: {advice}."
    )
    if on_failure == "raise":
        raise NonConvergenceError(message, solution)
    warnings.warn(message, NonConvergenceWarning, stacklevel=levels_to_caller())


def levels_to_caller() -> int:
    """Stack level, as `warnings.warn` in the calling function counts, of the first frame outside the library.

    A warning that names the user's line is shown once a line by Python's default filter.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("deqlib", "torch"):
        level, frame = level + 1, frame.f_back
    return level

"""What a solve returns, and what happens when it fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal

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
    EXITED = 6  # done by its readout, or place by place, before its residual met the tolerance

    @property
    def is_failure(self) -> bool:
        """Whether the failure policy applies."""
        return self not in (Status.CONVERGED, Status.COMPLETED, Status.EXITED)


@dataclass(frozen=True, eq=False)  # fields are tensors, which have no single truth value to compare by
class Solution:
    """Fixed points of a batch, with what is known about each.

    A pickle and a deep copy hold the numbers and not the graphs behind them.

    Attributes:
        value: best iterate seen, or the last with `Stopping(keep="last")`, structure and dtypes of the
            starting point; carries gradient if the solve was differentiated.
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
            With `Stopping(hold_places=True)` rows before the end are of the places at work.
        method: which of `methods` worked on each sample last, int64, shape (B,).
        methods: the solver's name, or those of the methods it tries in turn; a name may come twice.
        rejections: by cause, how many steps of each sample were refused, int64, shape (B,).
        state: the solver's last state; given to another solve it goes on with what was learnt. `None` where
            the solve ran under `torch.func` transforms.
        aux: what a cell of `has_aux=True` returned beside the state when it was evaluated at `value`; carries
            gradient as `value` does. Else `None`.
        place_steps: with `Stopping(hold_places=True)`: steps that each place took until it stood still,
            int64, structure of the starting point, every leaf without the axes in `norm_axes`: (B, L) for
            tokens. A place was evaluated once more, as a sample is. Else `None`.
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
    aux: Any = None
    place_steps: Any = None

    @property
    def converged(self) -> Tensor:
        """Which samples met the tolerance, bool, shape (B,)."""
        return self.status == Status.CONVERGED

    def counts(self) -> dict[Status, int]:
        """How many samples ended with each status; absent statuses are left out."""
        numbers = torch.bincount(self.status, minlength=len(Status)).tolist()
        return {status: number for status, number in zip(Status, numbers, strict=True) if number}

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
        trees = ("value", "aux")
        rest = {name: detached(known) for name, known in self.__dict__.items() if name not in trees}
        cut = {name: tree_map(_detached, getattr(self, name)) for name in trees}
        return {**cut, **rest}

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


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class NonConvergenceWarning(UserWarning):
    """A solve ended without meeting its tolerance; the best iterate was returned.

    Filters of warnings take two of them for the same if layer, kind and statuses are, whatever the numbers.

    Args:
        message: what failed, by status, and what to try.
        template: what two messages have in common that are the same to filters; `None`: all of the message.

    Attributes:
        layer: name of the layer in its model, or what solved where it has none.
        kind: "forward", "adjoint" or "tangent".
        counts: failed samples by status.
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str = "",
        kind: str = "forward",
        counts: dict[Status, int] | None = None,
        template: str | None = None,
    ) -> None:
        super().__init__(message)
        self.layer, self.kind, self.counts = layer, kind, counts or {}
        self._template = template

    def __str__(self) -> str:
        text = super().__str__()
        return text if self._template is None else _Numbered(text, self._template)


class _Numbered(str):
    """A text that is the same as others which differ from it in their numbers alone.

    Python's registry of warnings that were shown is a dictionary by text, so this is what it compares by.
    """

    def __new__(cls, text: str, template: str) -> _Numbered:
        self = super().__new__(cls, text)
        self.template = template
        return self

    template: str

    def __hash__(self) -> int:
        return hash(self.template)

    def __eq__(self, other: object) -> bool:
        return self.template == other.template if isinstance(other, _Numbered) else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type[_Numbered], tuple[str, str]]:
        return _Numbered, (str.__str__(self), self.template)


class NonConvergenceError(RuntimeError):
    """A solve ended without meeting its tolerance.

    Attributes:
        message: what failed, by status, and what to try.
        solution: what was reached, its value the best iterate of every sample.
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.message, self.solution = message, solution

    def __reduce__(self) -> tuple[Any, ...]:
        """With both arguments: an error that a process raises must reach the one that waits for it."""
        return type(self), (self.message, self.solution), self.__dict__


def levels_to_caller() -> int:
    """Stack level, as `warnings.warn` in the calling function counts, of the first frame outside the library.

    A warning that names the user's line is shown once a line by Python's default filter.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("deqlib", "torch"):
        level, frame = level + 1, frame.f_back
    return level

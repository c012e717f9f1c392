"""The contract of a readout: when what is made of a state is good enough, whatever the state still does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ._checks import check_integer, settle_numbers
from ._settings import Settings, arguments


@dataclass(frozen=True, kw_only=True)
class Readout(Settings, ABC):
    """What a model makes of a state, and when a sample may leave the loop because of it.

    Given as `Stopping(readout=...)`. At every evaluation of the cell the state z is read, and its image f(z)
    too where the readout compares them: what a residual is, asked of what matters. With the plain iteration
    f(z) is the next state, and its reading is kept, so the head runs once a step.

    A readout of one's own is a frozen, keyword-only dataclass with an `is_done`. It holds no state.

    Args:
        head: `head(state) -> Tensor`, of the state as the cell gets it, without gradient; the first axis of
            what it returns is the batch. What else it needs belongs in the state or in the head.
        num_in_a_row: evaluations in a row at which the answer must be yes.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    head: Callable[[Any], Tensor] = field(repr=False)
    num_in_a_row: int = 1

    compares: ClassVar[bool] = True  # whether the image is read too

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        owner = type(self).__name__
        if not callable(self.head):
            raise TypeError(
                f"{owner}: head must be callable, head(state) -> Tensor, got {type(self.head).__name__}"
            )
        check_integer(owner, 1, num_in_a_row=self.num_in_a_row)

    @abstractmethod
    def is_done(
        self,
        reading: Tensor,  # (B, ...)
        following: Tensor | None,  # (B, ...)
    ) -> Tensor:
        """What is good enough.

        Args:
            reading: the head at the state, (B, ...).
            following: the head at the image of the state, (B, ...); `None` unless `compares`.

        Returns:
            bool, one answer a sample, (B,), or one a place, (B, places...).
        """

    def __repr__(self) -> str:
        # A model as its head would fill a page.
        head = getattr(self.head, "__name__", type(self.head).__name__)
        rest = arguments(self)
        return f"{type(self).__name__}(head={head}{', ' * bool(rest)}{rest})"

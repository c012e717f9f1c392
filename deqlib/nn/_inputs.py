"""State and input of the modules here: whether they go together, told before an operation fails on them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_tensor


def check_alike(owner: str, state: Tensor, given: Tensor) -> None:
    """Raise `ValueError` unless an input is on the state's device, and has its shape or is spread to it."""
    fits = len(given.shape) <= len(state.shape) and all(
        a in (b, 1) for a, b in zip(given.shape[::-1], state.shape[::-1], strict=False)
    )
    if not fits or given.device != state.device:
        raise ValueError(
            f"{owner}: the input must go with a state of shape {tuple(state.shape)} on {state.device}, got "
            f"{tuple(given.shape)} on {given.device}"
        )


def check_input(owner: str, given: Tensor, width: int, weight: Tensor) -> None:
    """Raise unless an input is what a linear layer takes.

    Raises:
        TypeError: it is no tensor, or of another type than the weight where autocast does not see to that.
        ValueError: it has another width or is on another device.
    """
    check_tensor(owner, input=given)
    if given.shape[-1:] != (width,) or given.device != weight.device:
        raise ValueError(
            f"{owner}: the input must have shape (..., {width}) on {weight.device}, got {tuple(given.shape)} "
            f"on {given.device}"
        )
    if given.dtype != weight.dtype and not torch.is_autocast_enabled(given.device.type):
        raise TypeError(f"{owner}: the input must be {weight.dtype} as the weights are, got {given.dtype}")

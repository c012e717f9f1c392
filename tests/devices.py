"""What tests of a device have in common; the device itself is the fixture `device`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from waits import Waits, look_at_nothing

from deqlib import StochasticJFB


@contextlib.contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """A block in which the host must not wait for a GPU, nor do on a CPU what would be that on a GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with pytest.MonkeyPatch.context() as patch:
        look_at_nothing(patch)
        # The host draws it for itself, which only a CPU cannot tell from reading what a device drew.
        patch.setattr(StochasticJFB, "_draw", lambda self, bounds: bounds[1])
        with Waits() as waits:
            yield
    assert not waits.counts


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Nests of tensors are the same up to so much of the largest number, whatever their device and type."""
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        ours, exact = a.detach().cpu().double(), b.detach().cpu().double()
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * scale)

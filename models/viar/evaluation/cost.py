"""What sampling and training cost, in seconds and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deqlib.diagnostics import saved_bytes
from deqlib.diagnostics.timing import interleaved_times

from ..kinds import checked


@checked
def seconds_of(tasks: Sequence[Callable[[], object]], *, repeats: int = 3) -> list[float]:
    """Median seconds of each task, run in turns so that a slow moment of the machine meets them all.

    Args:
        tasks: what to run; a GPU's work is waited for.
        repeats: runs of each, the first of which is no warm-up but counts.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1 run of each task, got {repeats}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [statistics.median(taken) for taken in interleaved_times(tasks, repeats, device)]


@checked
def training_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that one training step needs, counted: exact on any device, whatever the allocator does.

    Parameters, their gradients, AdamW's two moments, and the activations saved for the backward pass of
    `loss()` (storages that parameters own are not counted twice).

    Args:
        model: what is trained.
        loss: one forward pass of a training step.
    """
    parameters = list(model.parameters())
    return 4 * sum(p.numel() * p.element_size() for p in parameters) + saved_bytes(loss, exclude=parameters)

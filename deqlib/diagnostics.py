"""Measures of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of `compute()`, counted exactly on any device.

    Every storage counts once, whole, however many saved tensors share it.

    Args:
        compute: runs the forward pass and returns what keeps its graph alive, its output or loss.
        exclude: tensors whose storages do not count, such as parameters.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = compute()  # alive until counted: a freed storage's address may be used again
    total = sum(saved.values())
    del output
    return total

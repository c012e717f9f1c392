"""What a backward pass keeps in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _Saved:
    """A tensor as autograd keeps it; gone when its graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would hold the node that holds it


def saved_bytes(compute: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `compute()`, counted exactly on any device.

    Every storage counts once, whole, however many saved tensors share it. What was saved for graphs that are
    gone when `compute` returns does not count.

    Args:
        compute: runs the forward pass and returns what keeps its graph alive, its output or loss.
        exclude: tensors whose storages do not count, such as parameters; default none.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def note(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept.tensor):
        output = compute()  # alive until counted
    ignored = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = [kept.tensor.untyped_storage() for kept in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output
    return sum(size for address, size in sizes.items() if address not in ignored)

"""What a backward pass keeps in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor

from .._checks import check_callable, check_instance
from .._torch import coordinates, is_wrapped, unwrapped, unwrapped_if_dead


class _Saved:
    """A tensor as autograd keeps it; gone when its graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would hold the node that holds it


def saved_bytes(compute: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `compute()`, counted exactly on any device.

    Every storage counts once, whole, however many saved tensors share it; of a sparse tensor those of its
    indices and of its values. What was saved for graphs that are gone when `compute` returns does not count.

    Args:
        compute: runs the forward pass and returns what keeps its graph alive, its output or loss.
        exclude: tensors whose storages do not count, such as parameters; default none.

    Raises:
        TypeError: an argument of another kind.
    """
    check_callable("saved_bytes", compute=compute)
    if isinstance(exclude, Tensor) or not isinstance(exclude, Iterable):
        raise TypeError(f"saved_bytes: exclude must be a list of tensors, got {type(exclude).__name__}")
    exclude = list(exclude)
    for tensor in exclude:
        check_instance("saved_bytes", Tensor, "tensors", exclude=tensor)
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def note(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept.tensor):
        output = compute()  # alive until counted
    ignored = dict(pair for tensor in exclude for pair in _storages(tensor))
    sizes = dict(pair for kept in saved for pair in _storages(kept.tensor))
    del output
    return sum(size for place, size in sizes.items() if place not in ignored)


def _storages(tensor: Tensor) -> Iterator[tuple[Hashable, int]]:
    """Where the numbers of a tensor lie, and how many bytes that holds: one or more places."""
    tensor = unwrapped_if_dead(tensor)
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    for part in parts_of(tensor):
        if part is not tensor:
            yield from _storages(part)
            continue
        try:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
        except (
            NotImplementedError,
            RuntimeError,
        ):  # a layout that shows no storage; its numbers are somewhere
            yield id(tensor), tensor.numel() * tensor.element_size()
        else:
            # Without data, as on the device "meta", the address tells nothing.
            yield place or id(tensor), storage.nbytes()


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of, where it has no storage of its own; else itself."""
    if tensor.layout == torch.sparse_coo:
        return list(coordinates(tensor))
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    # How PyTorch asks subclasses that wrap other tensors.
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten(tensor)[0]]

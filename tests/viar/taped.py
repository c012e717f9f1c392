"""A stand-in for CUDA graphs that runs on a CPU.

A step is recorded as the operations that reach the device, with the very memory they read and write, and
replayed as these operations: no line of Python runs again, as with a graph. What a graph cannot hold is
refused. What lay in the pool and was dropped is overwritten before another graph is replayed, as if that one
had been given the memory.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import viar.generation.graphs
import viar.model.graphs

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
COPIES_FROM_HOST = ("lift_fresh", "lift_fresh_copy")  # torch.tensor(numbers) and its like


class Tape(TorchDispatchMode):
    """What a step asks of the device; replayed over the same memory."""

    def __init__(self, device: TapeDevice) -> None:
        super().__init__()
        self.device = device
        self.launched: list[tuple[Any, Any, Any, list[Tensor]]] = []  # the last: to be filled by a replay
        self.own: dict[int, Tensor] = {}  # memory that the step was given from the pool, as bytes
        self.kept: set[int] = set()  # memory of earlier steps that was in use at its capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        refuse_what_no_graph_holds(name, func, args)
        out = func(*args, **kwargs)
        given, made = tensors((args, kwargs)), tensors(out)
        places = {place(t) for t in given}
        for tensor in made:
            if place(tensor) not in places and tensor.untyped_storage().nbytes():
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.own[place(tensor)] = memory
            self.device.users[place(tensor)].append(weakref.ref(tensor))
        returns = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if not returns or any(info.is_write for info in returns):  # no view
            # Other objects on the same memory: which tensors the step itself still holds is asked later.
            filled = [] if returns or name.startswith(("empty", "new_empty")) else [t.detach() for t in made]
            self.launched.append((func, alias(args), alias(kwargs), filled))
        return out

    def replay(self) -> None:
        for tape in self.device.tapes:
            if tape is not self:
                tape.spoil(keep=self.kept)
        for func, args, kwargs, filled in self.launched:
            again = func(*args, **kwargs)
            for there, new in zip(filled, tensors(again) if filled else [], strict=True):
                there.copy_(new)

    def spoil(self, keep: Set[int] = frozenset()) -> None:
        """Overwrite what the step was given, as those may who get it after it."""
        for where, memory in self.own.items():
            if where not in keep:
                memory.fill_(0xFF)


def refuse_what_no_graph_holds(name: str, func: Any, args: Any) -> None:
    is_random = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name
    # A single number may be one that is filled in from the host, which needs no copy.
    is_copied = name in COPIES_FROM_HOST and args[0].dim() > 0
    has_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors(args[1:2]))
    if name in READS or is_copied or is_random or has_mask:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


class TapeDevice:
    """In the place of `viar.model.graphs.Device`."""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[Tape] = []
        self.users: defaultdict[int, list[weakref.ref[Tensor]]] = defaultdict(list)
        MADE.append(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def capture(self, step: Callable[[], tuple[Any, ...]]) -> tuple[Tape, tuple[Any, ...]]:
        tape = Tape(self)
        tape.kept = {
            where for where, users in self.users.items() if any(user() is not None for user in users)
        }
        with tape:
            results = step()
        self.tapes.append(tape)
        tape.spoil()  # kernels of a capture do not run
        return tape, results

    def wait(self) -> None: ...

    @property
    def num_bytes(self) -> int:
        return sum(memory.numel() for tape in self.tapes for memory in tape.own.values())


MADE: list[TapeDevice] = []  # by the test at hand


def use_tapes(monkeypatch: pytest.MonkeyPatch) -> list[TapeDevice]:
    """Capture on the CPU by tapes; returns the list of the devices that will be made."""
    MADE.clear()
    monkeypatch.setattr(viar.model.graphs, "Device", TapeDevice)
    monkeypatch.setattr(viar.generation.graphs, "can_capture", lambda device: True)
    return MADE


def tensors(tree: Any) -> list[Tensor]:
    """Those in nested lists, tuples and dicts; PyTorch's own way takes most of a tape's time."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def alias(tree: Any) -> Any:
    """The same with other objects on the same memory."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {name: alias(part) for name, part in tree.items()}
    return type(tree)(map(alias, tree)) if isinstance(tree, list | tuple) else tree


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

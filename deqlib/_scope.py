"""What modules in a cell remember during one solve.

A cell is evaluated many times in a solve, and again in the backward pass. A module that draws something
(a dropout mask) must draw it once for all of these. It cannot keep it on itself: two forwards may come
before one backward. So it asks the scope, which belongs to the map that is being solved: the map enters it
around every evaluation, whoever asks for one and whenever, and it is gone when the map is.

A solve that starts within another one's evaluation shares that one's scope: the outer map would not be one
map if the inner solve drew anew at every evaluation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._torch import is_wrapped, unwrapped

T = TypeVar("T")


class Scope:
    """Values that modules made in one solve."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, made the first time it is asked for."""
        if key not in self._values:
            self._values[key] = make()
        value: T = self._values[key]
        return value

    def per_sample(self, key: Hashable, batch: int, make: Callable[[int], Tensor]) -> Tensor:
        """The tensor under `key` for so many samples, made by `make(batch)`, its first axis the batch."""
        return self.once((key, batch), lambda: _unwrapped(make(batch)))

    def take(self, samples: Tensor, batch: int) -> Scope:
        """The scope of these samples alone, out of `batch`."""
        return _Part(self, samples, batch)


class _Part(Scope):
    """Some samples of another scope: what is made for them is made for all and cut."""

    def __init__(self, whole: Scope, samples: Tensor, batch: int) -> None:
        super().__init__()
        self._whole, self._samples, self._batch = whole, samples, batch

    def __contains__(self, key: Hashable) -> bool:
        return key in self._whole

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """That of the whole."""
        return self._whole.once(key, make)

    def per_sample(self, key: Hashable, batch: int, make: Callable[[int], Tensor]) -> Tensor:
        """That of the whole, cut.

        Raises:
            ValueError: the caller's first axis is not the batch, so that it is not known what to cut.
        """
        if batch != len(self._samples):
            raise ValueError(
                f"compact: the mask of a module in the cell must be cut to {len(self._samples)} samples, but "
                f"its input has {batch} along the first axis; call the module where the first axis is the "
                "batch, or solve with compact=False"
            )
        found = self._values.get(key)
        if found is None:
            whole = self._whole.per_sample(key, self._batch, make)
            found = self._values[key] = _unwrapped(whole.index_select(0, self._samples))
        return found


def _unwrapped(tensor: Tensor) -> Tensor:
    """`tensor` itself, where a function transform of `torch.func` that will end before the solve wraps it."""
    if not torch.compiler.is_compiling():
        while is_wrapped(tensor):
            tensor = unwrapped(tensor)
    return tensor


class _Current(threading.local):
    """The scope in force in this thread. Not a context variable: torch.compile cannot trace those."""

    def __init__(self) -> None:  # in every thread; the compiler's guards ask for an attribute of the instance
        self.scope: Scope | None = None


current = _Current()


def current_or_new() -> Scope:
    """The scope of a solve that starts now."""
    return Scope() if current.scope is None else current.scope


class entered(AbstractContextManager[None]):  # named like a function, as in contextlib
    """Within it, modules ask this scope. May be entered again: a checkpoint may be recomputed twice."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._outer: list[Scope | None] = []

    def __enter__(self) -> None:
        self._outer.append(current.scope)
        current.scope = self._scope

    def __exit__(self, *_: object) -> None:
        current.scope = self._outer.pop()


def one_solve() -> AbstractContextManager[None]:
    """A block in which the modules of `deqlib.nn` behave as in one solve.

    They draw once: several solves, and evaluations of the cell outside of a solve, see one dropout mask and
    one spectral norm. `with one_solve(): z = layer(x); loss = jacobian_penalty(layer.cell, z, x)` measures
    the map that was solved. Leave the block before parameters change. Within a solve it changes nothing.
    """
    return entered(current_or_new())


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing of a cell's parts, or of a layer, with modules of `deqlib.nn` in it.

    `torch.utils.checkpoint.checkpoint(block, z, use_reentrant=False, context_fn=checkpoint_contexts)`: the
    recomputation in the backward pass then sees what the forward pass drew, from whichever generator.
    """
    scope = current_or_new()
    return entered(scope), entered(scope)

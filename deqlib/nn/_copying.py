"""Parametrized modules that can be pickled whole, and whose copies are modules of their own.

`torch.nn.utils.parametrize` gives a module a class made for it alone, with the parametrized weight as a
property. Such a class cannot be found by its name, so PyTorch refuses to pickle the module; and a deep copy
shares the class, so that taking the parametrization off one of the two takes the weight off the other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def make_copyable(module: nn.Module) -> None:
    """Let a module with parametrizations be pickled and deep-copied; changes its class, which is its own.

    A class that says itself how it is copied, above the one that PyTorch made, keeps that.
    """
    kind = type(module)
    setattr(kind, "__reduce_ex__", _reduce)  # noqa: B010 - a method of a class that has no source
    if not hasattr(kind.__bases__[0], "__deepcopy__"):
        setattr(kind, "__deepcopy__", _deepcopy)  # noqa: B010


def _reduce(module: nn.Module, _protocol: Any) -> tuple[Any, ...]:
    base = type(module).__bases__[0]
    names = tuple(module.parametrizations)  # type: ignore[arg-type]
    # That of the module before it was parametrized: PyTorch's own refuses.
    state = super(type(module), module).__getstate__()
    return _empty, (base, names), state


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    make, arguments, state = _reduce(module, None)
    copied: nn.Module = make(*arguments)
    memo[id(module)] = copied  # before what it holds is copied, which may lead back to it
    copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
    return copied


def _empty(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of class `base` with these weights parametrized, whose state is still to be set."""
    module = base.__new__(base)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity())
    make_copyable(module)
    return module

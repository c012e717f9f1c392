"""Tensors where a cell keeps them: put there for an evaluation, and taken away after it.

A cell reads its tensors at every evaluation: parameters of modules, what a function has by closure. When a
derivative asks for one, others may be in their place: `functional_call`, or `make_functional` of `functorch`,
put them back when the call was over. So it is noted what was where.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType
from typing import Any

from torch import Tensor, nn

from .._torch import namespaces, tree_leaves, tree_map

_DEPTH = 4  # of objects that refer to one another until a tensor or a module is met
_NAME = "contents"
_MISSING = object()

Place = tuple[Any, str, Any]  # a namespace, a name in it, and the tensor or tensors there


class _Closed:
    """The variable of a closure as a namespace of one name."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell

    def __contains__(self, _: str) -> bool:
        try:
            self._cell.cell_contents  # noqa: B018  # the only way to know
        except ValueError:
            return False
        return True

    def __getitem__(self, _: str) -> Any:
        return self._cell.cell_contents

    def __setitem__(self, _: str, value: Any) -> None:
        self._cell.cell_contents = value

    def __delitem__(self, _: str) -> None:
        del self._cell.cell_contents


def places_of(cell: Any) -> list[Place]:
    """All places of tensors in the modules and functions that `cell` is, holds or refers to, and those."""
    return list(_places(cell, _DEPTH, set()))


@contextmanager
def placed(places: list[Place], change: Callable[[Any], Any]) -> Iterator[None]:
    """A block in which what `change` makes of the tensors is in these places.

    Where that is there already, nothing is touched: a cell may write to what it keeps.
    """
    before: list[Place] = []
    try:
        for names, name, value in places:
            is_changed = any(change(leaf) is not leaf for leaf in tree_leaves(value))
            there, new = _there(names, name), tree_map(change, value) if is_changed else value
            if there is not new:
                before.append((names, name, there))
                names[name] = new
        yield
    finally:
        for names, name, value in before:
            if value is _MISSING:
                del names[name]
            else:
                names[name] = value


def _there(names: Any, name: str) -> Any:
    if name not in names:
        return _MISSING
    return names[name]


def _places(value: Any, depth: int, seen: set[int]) -> Iterator[Place]:
    """Those in a module, and in what a function or an object refers to."""
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for module in value.modules():
            for names in namespaces(module):
                # Not the dicts of parameters among the attributes: these are namespaces of their own.
                kept = [
                    (name, names[name]) for name in list(names.keys()) if not isinstance(names[name], dict)
                ]
                yield from ((names, name, one) for name, one in kept if _has_tensors(one))
        return
    for names, name in _names(value):
        one = names[name]
        if _has_tensors(one):
            yield names, name, one
        yield from _places(one, depth - 1, seen)
    for one in _parts(value):
        yield from _places(one, depth - 1, seen)


def _names(value: Any) -> list[tuple[Any, str]]:
    """Variables that a function or an object refers to, each as a namespace and a name in it."""
    if inspect.isfunction(value):
        closed = [_Closed(cell) for cell in value.__closure__ or ()]
        named = set(_global_names(value.__code__))
        known = [name for name in named if _is_wanted(value.__globals__.get(name))]
        return [
            *((one, _NAME) for one in closed if _NAME in one),
            *((value.__globals__, name) for name in known),
            *((value.__kwdefaults__ or {}, name) for name in value.__kwdefaults__ or {}),
        ]
    if isinstance(value, functools.partial):
        return [(value.keywords, name) for name in value.keywords]
    if _is_plain_object(value):
        return [(vars(value), name) for name in vars(value)]
    return []


def _parts(value: Any) -> list[Any]:
    """What else it refers to."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        return list(value.__defaults__ or ())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return []


def _is_plain_object(value: Any) -> bool:
    """Whether `value` is an object with attributes that takes part in a computation: one that is called."""
    return (
        callable(value)
        and hasattr(value, "__dict__")
        and not (inspect.isroutine(value) or isinstance(value, type))
    )


def _global_names(code: CodeType) -> Iterator[str]:
    """Those that a function uses, or one defined in it; names of attributes are among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _is_wanted(value: Any) -> bool:
    """Whether a global variable can matter: most are modules of Python and classes."""
    return isinstance(value, Tensor | nn.Module) or inspect.isfunction(value)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, list | tuple | dict) and any(
        isinstance(leaf, Tensor) for leaf in tree_leaves(value)
    )

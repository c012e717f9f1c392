"""Arguments of another kind than a signature says: refused by name, before any work and far from its depths.

What an annotation says of the kind of a value is looked at: numbers, text, tensors, paths, sequences and
mappings of them, classes. Ranges, shapes and lengths are for the function to tell.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "text",
    Tensor: "a dense tensor",
    NoneType: "None",
}
_SHOWN = 100  # longest value that an error repeats


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, whose arguments are looked at first.

    Raises:
        TypeError: an argument is of another kind than its annotation says.
        ValueError: an integer that 64 bits do not hold.
    """
    names = list(inspect.signature(function).parameters)
    hints: dict[str, Any] = {}

    @wraps(function)
    def call(*values: P.args, **named: P.kwargs) -> R:
        if not hints:  # now, as what annotations name may be defined below the function
            hints.update(get_type_hints(function))
        taken = {**dict(zip(names, values, strict=False)), **named}
        for name, value in taken.items():
            if name in hints:
                check_kind(f"{name}: expected", value, hints[name])
        if any(isinstance(value, np.generic) for value in taken.values()):  # not all of PyTorch takes them
            values, named = map(_plain, values), {name: _plain(value) for name, value in named.items()}  # type: ignore[assignment]
        return function(*values, **named)

    return call


def check_fields(settings: Any) -> None:
    """The same for the fields of a dataclass, and NumPy's numbers among them become Python's.

    Raises:
        TypeError, ValueError: see `checked`.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        check_kind(f"{type(settings).__name__}: {field.name} must be", value, hints[field.name])
        if isinstance(value, np.generic):
            object.__setattr__(settings, field.name, _plain(value))


def check_tensor(name: str, value: Any, *, has_numbers: bool = False) -> None:
    """Raise unless a value is a dense tensor.

    Compilers look into this without trouble, and it costs next to nothing.

    Args:
        name: of the argument.
        value: any.
        has_numbers: it must also have real numbers, which there are none of on the meta device.

    Raises:
        TypeError: it is none.
        ValueError: it has no real numbers.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise TypeError(f"{name}: expected {_NAMES[Tensor]}, got {shown(value)}")
    if has_numbers and (value.is_meta or value.is_complex()):
        raise ValueError(f"{name}: expected real numbers, got {shown(value)}")


def check_kind(expected: str, value: Any, kind: Any) -> None:
    """Raise unless a value is of a kind; `expected` begins the message.

    Raises:
        TypeError, ValueError: see `checked`.
    """
    if not _fits(value, kind):
        raise TypeError(f"{expected} {_told(kind)}, got {shown(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{expected} {_told(kind)} that 64 bits hold, got {shown(value)}")
    if isinstance(value, Path) and "\0" in str(value):
        raise ValueError(f"{expected} {_told(kind)} without characters of code 0, got {shown(value)}")
    for part in value if isinstance(value, tuple | list) else ():
        check_kind(expected, part, Any)


def shown(value: Any) -> str:
    """A value in a message, with its type: a module or a tensor would fill a page."""
    kind, text = type(value).__name__, repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)} on {value.device}, {value.layout}"
    return f"{text} ({kind})" if len(text) <= _SHOWN and "\n" not in text else kind


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, tuple({type(part) for part in parts}))
    if kind in (int, float):
        numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is Tensor:
        return isinstance(value, Tensor) and value.layout == torch.strided
    if origin in (tuple, list, Sequence, Collection):
        return _is_sequence(value) and _fit_in(value, origin, parts)
    if origin in (Mapping, dict, Iterable, Iterator):
        if origin in (Mapping, dict):
            return isinstance(value, Mapping)
        return isinstance(value, Iterable) and not isinstance(value, str | bytes)
    if origin is Callable:
        return callable(value)
    known = origin if isinstance(origin, type) else kind
    return isinstance(value, known) if isinstance(known, type) and known is not object else True


def _is_sequence(value: Any) -> bool:
    """Whether it is one of things, in order or as a set; text is none."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    return is_array or (
        isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping | Tensor)
    )


def _fit_in(value: Any, origin: Any, parts: tuple[Any, ...]) -> bool:
    """Whether what is in a sequence is of its kinds."""
    if not parts:
        return True
    if origin is tuple and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return all(_fits(one, parts[0]) for one in value)


def _told(kind: Any) -> str:
    """A kind in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_told(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if kind in _NAMES:
        return _NAMES[kind]
    return re.sub(
        r"[\w.]+\.(?=\w)", "", kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    )

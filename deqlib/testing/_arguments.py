"""What every test problem and strategy asks of its arguments, by what their annotations say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from .._checks import check_instance, check_integer, check_number, plain

P = ParamSpec("P")
R = TypeVar("R")
_LARGEST = 1e6  # of a gain or a rate: no problem is beyond
_MAY_BE_ZERO = ("num_hard", "batch", "min_batch", "max_batch", "max_axes", "max_length", "seed")


def checked(make: Callable[P, R]) -> Callable[P, R]:
    """The same function, which refuses sizes, numbers, types and names that are none.

    Raises:
        TypeError, ValueError: see above.
    """
    parameters = inspect.signature(make).parameters
    owner = make.__name__

    def settled(name: str, value: Any) -> Any:
        return _settled(owner, name, parameters[name].annotation, value) if name in parameters else value

    @wraps(make)
    def call(*values: P.args, **named: P.kwargs) -> R:
        by_position = [settled(name, value) for name, value in zip(parameters, values, strict=False)]
        by_name = {name: settled(name, value) for name, value in named.items()}
        rest: Any = values[len(by_position) :]  # too many of them: for Python to refuse
        return make(*by_position, *rest, **by_name)

    return call


def _settled(owner: str, name: str, kind: str, value: Any) -> Any:
    """A value, its numbers Python's own.

    Raises:
        TypeError, ValueError: it is none of its kind.
    """
    if kind == "int":
        check_integer(owner, 0 if name in _MAY_BE_ZERO else 1, **{name: value})
    elif kind == "float":
        check_number(owner, -_LARGEST, _LARGEST, **{name: value})
    elif kind in ("torch.dtype", "Sequence[torch.dtype]"):
        if kind != "torch.dtype":
            check_instance(owner, Sequence, "a list of types", **{name: value})
        for dtype in [value] if kind == "torch.dtype" else value:
            check_instance(owner, torch.dtype, "a type such as torch.float32", **{name: dtype})
            if not dtype.is_floating_point:
                raise ValueError(f"{owner}: {name} must be a floating-point type, got {dtype}")
    elif kind == "str":
        check_instance(owner, str, "text", **{name: value})
    return plain(value)

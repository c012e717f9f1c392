"""Validation shared by the settings dataclasses: errors name the owner, the argument and what came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_SHOWN = 100  # longest value that an error repeats


def plain(value: Any) -> Any:
    """`value`, a number of NumPy's or another library's as Python's own, in tuples too.

    They are counted and compared like Python's, but not every function of PyTorch takes them.
    """
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(plain(part) for part in value)
    if isinstance(value, bool | int | float):
        return float(value) if isinstance(value, float) else value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def settle_numbers(settings: Any) -> None:
    """Make the numbers among the fields of a frozen dataclass Python's own, see `plain`."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        settled = plain(value)
        if settled is not value:
            object.__setattr__(settings, field.name, settled)


def check_integer(owner: str, minimum: int, **values: Any) -> None:
    """Raise unless every value is an integer of at least `minimum`, Python's or another library's."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{owner}: {name} must be an int, got {value!r} ({type(value).__name__})")
        if int(value) < minimum:
            raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value}")
        if int(value) >= 2**63:
            raise ValueError(f"{owner}: {name} must be below 2**63, got {value}")


def check_number(
    owner: str, minimum: float, maximum: float = float("inf"), *, open_minimum: bool = False, **values: Any
) -> None:
    """Raise unless every value is a real number in [minimum, maximum], or (minimum, maximum]."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r} ({type(value).__name__})")
        if isinstance(value, Integral) and abs(int(value)) >= 2**63:
            raise ValueError(f"{owner}: {name} must be a float where 64 bits do not hold it, got {value}")
        number = float(value)
        inside = number > minimum if open_minimum else number >= minimum
        if not (inside and number <= maximum):  # written so that NaN fails
            bracket = "(" if open_minimum else "["
            raise ValueError(f"{owner}: {name} must be in {bracket}{minimum}, {maximum}], got {value}")


def check_instance(owner: str, expected: type, hint: str, **values: Any) -> None:
    """Raise `TypeError` unless every value is an instance of `expected`; `hint` says what to pass."""
    for name, value in values.items():
        if not isinstance(value, expected):
            kind, shown = type(value).__name__, repr(value)
            # A module or a tensor fills a page.
            got = f"{shown} ({kind})" if len(shown) <= _SHOWN and "\n" not in shown else kind
            raise TypeError(f"{owner}: {name} must be {hint}, got {got}")


def check_choice(owner: str, choices: tuple[str | None, ...], **values: Any) -> None:
    """Raise `ValueError` unless every value is one of the choices; an array of them is none."""
    for name, value in values.items():
        if not isinstance(value, str | None) or value not in choices:
            raise ValueError(f"{owner}: {name} must be one of {choices}, got {value!r}")


def check_callable(owner: str, **values: Any) -> None:
    """Raise `TypeError` unless every value can be called."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{owner}: {name} must be callable, got {type(value).__name__}")


def check_keywords(owner: str, kwargs: Any) -> None:
    """Raise `TypeError` unless these are inputs of a cell by name."""
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise TypeError(f"{owner}: kwargs must be a dict with names as its keys, got {type(kwargs).__name__}")


def check_generator(owner: str, generator: Any) -> None:
    """Raise `TypeError` unless random numbers can be drawn from it; `None` is PyTorch's own."""
    if generator is not None:
        check_instance(owner, torch.Generator, "a torch.Generator or None", generator=generator)


def check_tensor(owner: str, **values: Any) -> None:
    """Raise `TypeError` unless every value is a dense tensor."""
    for name, value in values.items():
        check_instance(owner, Tensor, "a tensor", **{name: value})
        if value.layout != torch.strided:
            raise TypeError(f"{owner}: {name} must be dense, got a tensor of layout {value.layout}")

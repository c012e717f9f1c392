"""Validation shared by the settings dataclasses: errors name the owner, the argument and what came."""

from __future__ import annotations

from typing import Any


def check_integer(owner: str, minimum: int, **values: Any) -> None:
    """Raise unless every value is an `int` of at least `minimum`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {name} must be an int, got {value!r} ({type(value).__name__})")
        if value < minimum:
            raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value}")


def check_number(
    owner: str, minimum: float, maximum: float = float("inf"), *, open_minimum: bool = False, **values: Any
) -> None:
    """Raise unless every value is a real number in [minimum, maximum], or (minimum, maximum]."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r} ({type(value).__name__})")
        inside = value > minimum if open_minimum else value >= minimum
        if not (inside and value <= maximum):  # written so that NaN fails
            bracket = "(" if open_minimum else "["
            raise ValueError(f"{owner}: {name} must be in {bracket}{minimum}, {maximum}], got {value}")


def check_instance(owner: str, expected: type, hint: str, **values: Any) -> None:
    """Raise `TypeError` unless every value is an instance of `expected`; `hint` says what to pass."""
    for name, value in values.items():
        if not isinstance(value, expected):
            raise TypeError(f"{owner}: {name} must be {hint}, got {value!r} ({type(value).__name__})")

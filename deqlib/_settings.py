"""Settings as text: what differs from the defaults, in a form that Python reads back."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any


class Settings:
    """What solvers, backward modes and stopping rules are: dataclasses whose repr names what is not default.

    A class that defines a `__repr__` of its own keeps it, and so do those made from it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `dataclass` writes a repr for every class that has none in its own body.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        if not is_dataclass(self):
            return object.__repr__(self)
        return f"{type(self).__name__}({arguments(self)})"


def arguments(settings: Any, names: Collection[str] | None = None) -> str:
    """The arguments that make a dataclass what it is, "memory=5, damping=0.5"; empty where all are default.

    Args:
        settings: a dataclass of settings.
        names: of the fields that may be shown; default all.
    """
    shown = [
        f"{field.name}={_text(value)}"
        for field in fields(settings)
        if field.init and field.repr and (names is None or field.name in names)
        for value in [getattr(settings, field.name)]
        if not is_same(value, _default(field))
    ]
    return ", ".join(shown)


def is_same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, or one object where they cannot be compared, as tensors."""
    if one is other:
        return True
    try:
        return bool(one == other)
    except Exception:  # whatever a class of the user's raises
        return False


def _default(field: Field[Any]) -> Any:
    """`MISSING`, which nothing equals, where there is none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _text(value: Any) -> str:
    # The repr of these, "inf" and "nan", are names that Python does not know.
    is_odd = isinstance(value, float) and not math.isfinite(value)
    return f"float({str(value)!r})" if is_odd else repr(value)

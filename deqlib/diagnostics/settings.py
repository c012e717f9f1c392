"""What is compared: its validation, its names, and the solvers that backward modes run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from .._checks import check_instance
from ..backward import Backward
from ..solvers import Anderson, Broyden, Picard, ReversiblePicard, Solver
from ..stopping import Stopping


def check_sequence(owner: str, kind: type, **given: Sequence[Any]) -> None:
    """Raise `TypeError` unless every argument is a list or tuple of objects of `kind`."""
    for name, sequence in given.items():
        if not isinstance(sequence, list | tuple):
            raise TypeError(f"{owner}: {name} must be a list or tuple, got {type(sequence).__name__}")
        for i, one in enumerate(sequence):
            check_instance(owner, kind, f"a deqlib {kind.__name__.lower()}", **{f"{name}[{i}]": one})


def with_tolerance(stopping: Stopping) -> Stopping:
    """The rule, or `Stopping()` with its norm where it is a fixed number of steps."""
    return Stopping(norm_axes=stopping.norm_axes) if stopping.is_fixed else stopping


def accepted_solver(mode: Backward, solver: Solver, stopping: Stopping, owner: str) -> Solver:
    """The solver, or the first of the usual ones that the mode works with.

    Args:
        mode: whose `check` is asked.
        solver: of the layer.
        stopping: of the layer.
        owner: function and argument that an error names.

    Raises:
        ValueError: the mode refuses all of them.
    """
    reason = ""
    for candidate in (solver, Broyden(), Picard(), Anderson(), ReversiblePicard()):
        try:
            mode.check(candidate, stopping)
        except ValueError as error:
            reason = reason or str(error)
        else:
            return candidate
    raise ValueError(
        f"{owner} must work with the layer's solver, or Broyden, Picard, Anderson or ReversiblePicard, and "
        f"its stopping rule, got {mode}: {reason}"
    )


def labels(settings: Sequence[Any]) -> list[str]:
    """Class names; where several are of one class, with the fields that tell them apart."""
    names = []
    for one in settings:
        same = [other for other in settings if type(other) is type(one)]
        known = fields(one) if is_dataclass(one) else ()
        differing = [
            f.name for f in known if any(getattr(one, f.name) != getattr(other, f.name) for other in same)
        ]
        details = ", ".join(f"{name}={getattr(one, name)!r}" for name in differing)
        names.append(type(one).__name__ + (f"({details})" if details else ""))
    return names

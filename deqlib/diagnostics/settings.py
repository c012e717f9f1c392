"""What is compared: its validation, its names, and the solvers that backward modes run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import nn

from .._checks import check_instance
from .._settings import arguments, is_same
from ..backward import Backward, ImplicitDifferentiation, StochasticJFB
from ..layer import ImplicitLayer
from ..solvers import Anderson, Broyden, Picard, ReversiblePicard, Solver
from ..stopping import Stopping

S = TypeVar("S")


def check_layer(owner: str, layer: object) -> None:
    """Raise `TypeError` unless this is a layer; the error says where one is, if the object holds any."""
    if isinstance(layer, ImplicitLayer):
        return
    way = ""
    if isinstance(layer, nn.Module):
        names = [name for name, module in layer.named_modules() if isinstance(module, ImplicitLayer)]
        way = (
            "; it holds none"
            if not names
            else (
                f"; the layers in it are {', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)}: pass "
                f"one, get_submodule({names[0]!r}), with the inputs that arrive there"
            )
        )
    raise TypeError(f"{owner}: layer must be a deqlib.ImplicitLayer, got {type(layer).__name__}{way}")


def check_sequence(owner: str, kind: type, **given: Sequence[Any]) -> None:
    """Raise `TypeError` unless every argument is a list or tuple of objects of `kind`."""
    for name, sequence in given.items():
        if not isinstance(sequence, list | tuple):
            raise TypeError(f"{owner}: {name} must be a list or tuple, got {type(sequence).__name__}")
        for i, one in enumerate(sequence):
            check_instance(owner, kind, f"a deqlib {kind.__name__.lower()}", **{f"{name}[{i}]": one})


def with_tolerance(stopping: Stopping) -> Stopping:
    """The rule by its residual alone, or `Stopping()` with its norm where that says nothing.

    It says nothing of a fixed number of steps, and where a readout decides and both tolerances are 0.
    """
    if stopping.is_fixed or (stopping.readout is not None and not (stopping.rtol or stopping.atol)):
        return Stopping(norm_axes=stopping.norm_axes)
    return replace(stopping, readout=None, min_steps=0, keep=None, hold_places=False)


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


def separate(mode: Backward) -> Backward:
    """The mode without the objects in it that runs would change."""
    if isinstance(mode, ImplicitDifferentiation):
        return replace(mode, warm_start=None)
    if isinstance(mode, StochasticJFB) and mode.generator is not None:
        return replace(mode, generator=mode.generator.clone_state())
    return mode


def labels(settings: Sequence[Any]) -> list[str]:
    """Class names; of several of one class with what tells them apart and differs from the defaults.

    What cannot be told apart so is numbered.
    """
    names: list[str] = []
    for one in settings:
        same = [other for other in settings if type(other) is type(one)]
        known = [field.name for field in fields(one)] if is_dataclass(one) else []
        differing = [
            name
            for name in known
            if not all(is_same(getattr(one, name), getattr(other, name)) for other in same)
        ]
        details = arguments(one, differing) if differing else ""
        names.append(type(one).__name__ + (f"({details})" if details else ""))
    return [
        name if names.index(name) == i else f"{name} #{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def each_once(settings: Sequence[S]) -> list[S]:
    """The settings in order without those that are equal to one before."""
    return [one for i, one in enumerate(settings) if not any(is_same(one, before) for before in settings[:i])]

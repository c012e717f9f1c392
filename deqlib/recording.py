"""Seeing every solve of a stretch of a program, those that a training step hides too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from textwrap import shorten, wrap
from typing import Any

import torch
from torch import Tensor

from ._checks import check_instance
from ._torch import is_wrapped, tree_map, unwrapped
from .solution import Solution, Status

_COLUMNS = 100  # widest line of a table
_NAME = 28  # of them for the names of layers
_MEASURES = ("residual", "relative_residual", "num_steps", "status", "sample_nfe", "trace", "method")


@dataclass(frozen=True, eq=False)  # the solution holds tensors
class RecordedSolve:
    """One solve, as `deqlib.record` saw it.

    Attributes:
        layer: name in its model, such as "encoder.1"; of a layer that is in none, and of the cell that
            `deqlib.fixed_point` was given, what it is, such as "ImplicitLayer of Cell".
        kind: "forward", "adjoint" or "tangent".
        solution: off the graph and without `state`; its value is `None` unless it was asked for.
    """

    layer: str
    kind: str
    solution: Solution

    def __repr__(self) -> str:
        return shorten(f"RecordedSolve({self.layer}, {self.kind}: {self.solution!r})", _COLUMNS)


class RecordedSolves(list[RecordedSolve]):
    """Solves in the order in which they ended.

    Prints as a table, one row for each layer and kind: how many solves, their mean and most evaluations, the
    largest relative residual, samples by status.
    """

    def __repr__(self) -> str:
        groups: dict[tuple[str, str], list[Solution]] = {}
        for solve in self:
            groups.setdefault((solve.layer, solve.kind), []).append(solve.solution)
        if not groups:
            return "no solves"
        head = ("layer", "kind", "solves", "mean nfe", "most nfe", "residual", "samples")
        layers = list(dict.fromkeys(layer for layer, _ in groups))  # in the order of their first solve
        ordered = sorted(groups.items(), key=lambda group: layers.index(group[0][0]))
        rows = [(layer, _shortened(kind, 12), *_summary(found)) for (layer, kind), found in ordered]
        return "\n".join(_aligned(head, rows))


# The blocks that are open. The engine of autograd runs backward passes in threads of its own, which know no
# context of the thread that asked for them, so this cannot be kept by thread.
_blocks: tuple[tuple[RecordedSolves, bool], ...] = ()
_changing = threading.Lock()


@contextmanager
def record(*, values: bool = False) -> Iterator[RecordedSolves]:
    """A block in which every solve is recorded: `with deqlib.record() as solves:`, then `print(solves)`.

    Recorded are forward, adjoint and tangent solves that end while the block is open, in any thread, of
    every layer and of `deqlib.fixed_point`, whatever their `on_failure`, and solves that end in an error
    because of it. A backward pass after the block leaves nothing; blocks inside of one another each see all.
    Under the transforms of `torch.func` one solve holds the samples of many batches, and `nfe` leaves out the
    evaluation for derivatives. Solves of a fixed number of steps that `torch.compile` has made part of a
    graph are not seen; those to a tolerance are.

    Costs nothing while no block is open. In one, each solve is kept with its measures, a few numbers a sample
    and step, on its device.

    Args:
        values: keep a copy of every value too.

    Yields:
        A list of `RecordedSolve`, which grows.

    Raises:
        TypeError: `values` is not a bool.
    """
    check_instance("record", bool, "True or False", values=values)
    global _blocks
    solves = RecordedSolves()
    with _changing:
        _blocks = (*_blocks, (solves, values))
    try:
        yield solves
    finally:
        with _changing:
            _blocks = tuple(block for block in _blocks if block[0] is not solves)


def is_recording() -> bool:
    """Whether a block is open."""
    return bool(_blocks)


def note(layer: str, kind: str, solution: Solution) -> None:
    """Give a solve to the blocks that are open.

    Args:
        layer: its name.
        kind: of the solve.
        solution: as the caller gets it; its tensors stay untouched.
    """
    for solves, values in _blocks:
        solves.append(RecordedSolve(layer, kind, _kept(solution, values)))


def _kept(solution: Solution, values: bool) -> Solution:
    """The solution as it is kept: off the graph, and by itself."""

    found = {name: getattr(solution, name) for name in _MEASURES}
    measured: dict[str, Any] = {name: _bare(tensor) for name, tensor in found.items() if tensor is not None}
    if solution.place_steps is not None:
        measured["place_steps"] = tree_map(_bare, solution.place_steps)
    return replace(
        solution,
        value=tree_map(lambda leaf: _bare(leaf.clone()), solution.value) if values else None,
        rejections={cause: _bare(counts) for cause, counts in solution.rejections.items()},
        state=None,
        aux=None,
        **measured,
    )


def _bare(tensor: Tensor) -> Tensor:
    """The tensor off the graph; what a function transform wrapped is taken out, since the transform ends."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor.data  # `detach` would wrap it once more


def _summary(solutions: list[Solution]) -> tuple[str, ...]:
    """Number of solves, their mean and most evaluations, the worst residual, samples by status."""
    evaluations = [solution.nfe for solution in solutions]
    residuals = [s.relative_residual for s in solutions if s.relative_residual is not None]
    known = torch.cat([residual.flatten().double().cpu() for residual in residuals]) if residuals else None
    counts: dict[Status, int] = {}
    for solution in solutions:
        for status, number in solution.counts().items():
            counts[status] = counts.get(status, 0) + number
    return (
        str(len(solutions)),
        f"{sum(evaluations) / len(evaluations):.1f}",
        str(max(evaluations)),
        f"{float(known.max()):.1e}" if known is not None and known.numel() else "-",
        ", ".join(f"{number} {status.name.lower()}" for status, number in sorted(counts.items())) or "none",
    )


def _aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Words to the left, numbers to the right; first and last columns are broken where they are full."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:-1]
    widths[0] = min(widths[0], _NAME)
    lines = []
    for name, *cells, last in (head, *rows):
        names = _broken(name, widths[0])
        shown = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths[1:], strict=True))
        ]
        middle = "  " + "  ".join(shown) + "  "
        parts = wrap(last, _COLUMNS - widths[0] - len(middle))
        for i, (part, more) in enumerate(zip_longest(names, parts, fillvalue="")):
            between = middle if i == 0 else " " * len(middle)
            lines.append(f"{part:<{widths[0]}}{between}{more}".rstrip())
    return lines


def _broken(name: str, width: int) -> list[str]:
    """A name in lines, whole: two layers of a model differ somewhere in it."""
    lines = []
    while len(name) > width:
        # Not at the blanks in front, which would leave it as long as it was.
        place = max(name.rfind(".", 3, width), name.rfind(" ", 3, width)) + 1 or width
        lines.append(name[:place].rstrip())
        name = "  " + name[place:]
    return [*lines, name]


def _shortened(name: str, width: int) -> str:
    """A name whose middle is left out where it is long."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[-(width - 3 - half) :]}"

"""Diagnoses and ablations as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..solvers import Solver
from ..stopping import Stopping
from .reports import GradientReport, MetricReport, SolveReport

R = TypeVar("R")
Columns = Sequence[tuple[str, Callable[[R], str]]]  # head, and what stands below it for a report

_EVALUATIONS: tuple[str, Callable[[SolveReport], str]] = ("evaluations", lambda report: str(report.nfe))
_WORST: tuple[str, Callable[[SolveReport], str]] = ("worst", lambda report: _number(report.residual))
_ENDED: tuple[str, Callable[[SolveReport], str]] = ("ended", lambda report: report.outcome)

_SOLVES: Columns[SolveReport] = (
    _EVALUATIONS,
    _WORST,
    ("median", lambda report: _number(float(report.relative_residual.median()))),
    _ENDED,
)
_TIMED_SOLVES: Columns[SolveReport] = (
    _EVALUATIONS,
    _WORST,
    _ENDED,
    ("ms", lambda report: _number(1e3 * report.seconds)),
)
_COSTS: Columns[GradientReport] = (
    ("on tape", lambda report: str(report.evaluations)),
    ("products", lambda report: str(report.products)),
    ("kept", lambda report: _bytes(report.saved_bytes)),
)
_GRADIENTS: Columns[GradientReport] = (
    ("cosine", lambda report: _number(report.cosine)),
    ("norm ratio", lambda report: _number(report.norm_ratio)),
    ("of inputs", lambda report: _number(report.input_cosine)),
    ("norm ratio", lambda report: _number(report.input_norm_ratio)),
    *_COSTS,
)
_TIMED_GRADIENTS: Columns[GradientReport] = (
    ("cosine", lambda report: _number(report.cosine)),
    ("error", lambda report: _number(report.error)),
    ("of inputs", lambda report: _number(report.input_cosine)),
    ("error", lambda report: _number(report.input_error)),
    *_COSTS,
    ("ms", lambda report: _number(1e3 * report.seconds)),
)


def page(*parts: str) -> str:
    """The parts with empty lines between; one without text is left out."""
    return "\n\n".join(filter(None, parts))


def headline(batch: int, width: int, dtype: torch.dtype, stopping: Stopping, where: str = "") -> str:
    """What was measured, and the rule of the solves."""
    kind = str(dtype).removeprefix("torch.")
    rule = f"relative residual {stopping.rtol:.0e} within {stopping.max_steps} steps"
    return f"{batch} samples of {width} numbers, {kind}{where}, {rule}"


def lines(prefix: str, items: Iterable[str]) -> str:
    """One line an item."""
    return "\n".join(prefix + item for item in items)


def solve_table(reports: Sequence[tuple[str, SolveReport]]) -> str:
    """Solves by the name to show."""
    return _table("solve", _SOLVES, reports)


def timed_solve_table(reports: Sequence[SolveReport]) -> str:
    """Solves with their times in ms."""
    return _table("solver", _TIMED_SOLVES, [(report.name, report) for report in reports])


def number_table(reports: Iterable[MetricReport]) -> str:
    """Every number that metrics tell of each sample: the smallest, the median, the largest."""
    head = ("at the fixed point", "least", "median", "largest")
    numbers = [pair for report in reports for pair in report.numbers().items()]
    return _aligned(head, [(name, *map(_number, _range(values))) for name, values in numbers])


def gradient_table(modes: Sequence[GradientReport], layer_solver: Solver) -> str:
    """Backward modes, with their solver where that is not the layer's."""
    return _table("gradient", _GRADIENTS, _named(modes, layer_solver))


def timed_gradient_table(modes: Sequence[GradientReport], layer_solver: Solver) -> str:
    """The same with errors in place of norm ratios, and times in ms."""
    return _table("backward", _TIMED_GRADIENTS, _named(modes, layer_solver))


def _named(modes: Sequence[GradientReport], layer_solver: Solver) -> list[tuple[str, GradientReport]]:
    """Modes by name, with the solver where that is not the layer's."""
    return [
        (mode.name + f", by {type(mode.solver).__name__}" * (mode.solver != layer_solver), mode)
        for mode in modes
    ]


def _table(kind: str, columns: Columns[R], reports: Sequence[tuple[str, R]]) -> str:
    """One line a report, its name first; nothing where there are no reports."""
    if not reports:
        return ""
    rows = [(name, *(show(report) for _, show in columns)) for name, report in reports]
    return _aligned((kind, *(head for head, _ in columns)), rows)


def _aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Names to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for name, *cells in (head, *rows):
        shown = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *shown]).rstrip())
    return "\n".join(lines)


def _range(values: Tensor) -> tuple[float, ...]:
    """Smallest, median and largest of those that are known."""
    known = values[~values.isnan()]
    if not known.numel():
        return math.nan, math.nan, math.nan
    return known.min().item(), known.median().item(), known.max().item()


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int):
        return str(value)
    small = value != 0 and abs(value) < 1e-2
    return f"{value:.1e}" if small or abs(value) >= 1e4 else f"{value:.3f}"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"

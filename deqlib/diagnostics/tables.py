"""Diagnoses and ablations as text."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from ..stopping import Stopping
from .gradients import Difference
from .precision import PrecisionReport
from .reports import WIDTH, GradientReport, MetricReport, SolveReport, tolerance_of

_GAP = "  "
_INDENTED = 16  # width from which on continued lines are indented

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
    ("ms", lambda report: _milliseconds(report.seconds)),
)
_COSTS: Columns[GradientReport] = (
    ("tape", lambda report: str(report.evaluations)),
    ("products", lambda report: str(report.products)),
    ("kept", lambda report: "-" if report.saved_bytes is None else _bytes(report.saved_bytes)),
)
_GRADIENTS: Columns[GradientReport] = (
    ("cosine", lambda report: _number(report.cosine)),
    ("ratio", lambda report: _number(report.norm_ratio)),
    ("inputs", lambda report: _number(report.input_cosine)),
    ("ratio", lambda report: _number(report.input_norm_ratio)),
    *_COSTS,
)
_TIMED_GRADIENTS: Columns[GradientReport] = (
    ("cosine", lambda report: _number(report.cosine)),
    ("error", lambda report: _number(report.error)),
    ("inputs", lambda report: _number(report.input_cosine)),
    ("error", lambda report: _number(report.input_error)),
    *_COSTS,
    ("ms", lambda report: _milliseconds(report.seconds)),
)
_ERRORS: Columns[Difference] = (
    ("of parameters", lambda report: _number(report.error)),
    ("of inputs", lambda report: _number(report.input_error)),
)


def page(*parts: str) -> str:
    """The parts with empty lines between; one without text is left out."""
    return "\n\n".join(filter(None, parts))


def headline(batch: int, width: int, dtype: torch.dtype, stopping: Stopping, where: str = "") -> str:
    """What was measured, and the rule of the solves."""
    kind = str(dtype).removeprefix("torch.")
    rule = f"{tolerance_of(stopping)} within {stopping.max_steps} steps"
    return lines("", [f"{batch} samples of {width} numbers, {kind}{where}, {rule}"])


def lines(prefix: str, items: Iterable[str]) -> str:
    """A paragraph an item, with the prefix at its first line."""
    indent = " " * len(prefix)
    return "\n".join(
        line
        for item in items
        for line in textwrap.wrap(
            prefix + " ".join(item.split()), WIDTH, subsequent_indent=indent, break_on_hyphens=False
        )
    )


def solve_table(reports: Sequence[tuple[str, SolveReport]], evaluation_seconds: float) -> str:
    """Solves by the name to show; with times, and how many evaluations of the cell take as long, if known."""
    if math.isnan(evaluation_seconds):
        return _table("solve", _SOLVES, reports)
    timed: Columns[SolveReport] = (
        *_SOLVES,
        ("ms", lambda report: _milliseconds(report.seconds)),
        ("in evaluations", lambda report: _ratio(report.seconds, evaluation_seconds)),
    )
    return _table("solve", timed, reports)


def timed_solve_table(reports: Sequence[tuple[str, SolveReport]]) -> str:
    """Solves with their times in ms."""
    return _table("solver", _TIMED_SOLVES, reports)


def number_table(reports: Iterable[MetricReport]) -> str:
    """Every number that metrics tell of each sample: the smallest, the median, the largest."""
    head = ("at the fixed point", "least", "median", "largest")
    numbers = [pair for report in reports for pair in report.numbers().items()]
    return aligned(head, [(name, *map(_number, _range(values))) for name, values in numbers])


def gradient_table(modes: Sequence[tuple[str, GradientReport]]) -> str:
    """Backward modes by the name to show."""
    return _table("gradient", _GRADIENTS, modes)


def timed_gradient_table(modes: Sequence[tuple[str, GradientReport]]) -> str:
    """The same with errors in place of norm ratios, and times in ms."""
    return _table("backward", _TIMED_GRADIENTS, modes)


def step_table(modes: Sequence[tuple[str, GradientReport]], evaluation_seconds: float) -> str:
    """What a training step with each mode takes, its two passes apart; nothing where it was not timed."""
    if math.isnan(evaluation_seconds):
        return ""
    columns: Columns[GradientReport] = (
        ("forward ms", lambda report: _milliseconds(report.forward_seconds)),
        ("backward ms", lambda report: _milliseconds(report.backward_seconds)),
        ("in evaluations", lambda report: _ratio(report.seconds, evaluation_seconds)),
    )
    one = f"one evaluation of the cell takes {_milliseconds(evaluation_seconds)} ms"
    return _table("training step", columns, modes) + "\n" + one


def precision_table(found: PrecisionReport) -> str:
    """Errors of the exact gradient by which solve stops where the layer's does."""
    rows = {
        "forward and adjoint as the layer's": found.both,
        "forward as the layer's, adjoint tight": found.forward,
        "forward tight, adjoint as the layer's": found.adjoint,
    }
    shown = [(name, errors) for name, errors in rows.items() if errors is not None]
    return _table("error of the exact gradient", _ERRORS, shown)


def _table(kind: str, columns: Columns[R], reports: Sequence[tuple[str, R]]) -> str:
    """One line a report, its name first; nothing where there are no reports."""
    if not reports:
        return ""
    rows = [(name, *(show(report) for _, show in columns)) for name, report in reports]
    return aligned((kind, *(head for head, _ in columns)), rows)


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Names to the left, the rest to the right, at most `WIDTH` wide: the longest cells are broken."""
    columns = [list(column) for column in zip(head, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    while (excess := sum(widths) + len(_GAP) * (len(widths) - 1) - WIDTH) > 0:
        widest = max(range(len(widths)), key=lambda i: widths[i])
        second = max((width for i, width in enumerate(widths) if i != widest), default=0)
        widths[widest] -= max(1, min(excess, widths[widest] - second))
    shown = []
    for row in zip(*columns, strict=True):
        cells = [broken(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            name, *rest = (f"{part:{'>' if i else '<'}{widths[i]}}" for i, part in enumerate(parts))
            shown.append(_GAP.join([name, *rest]).rstrip())
    return "\n".join(shown)


def broken(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken where a setting or a word begins, then indented."""
    found, line = [], ""
    for piece in re.findall(r"\(layer\)|[^\s(,]*(?:, ?|\(|\s|$)", text):
        if line.strip() and len(line) + len(piece.rstrip()) > width:
            found.append(line.rstrip())
            line = "  " if width > _INDENTED else ""
        line += piece
        while len(line.rstrip()) > width:
            found.append(line[:width])
            line = ("  " if width > _INDENTED else "") + line[width:]
    return [*found, line.rstrip()]


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


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    places = 3 if seconds < 1e-3 else 1 if seconds < 0.1 else 0
    return f"{1e3 * seconds:.{places}f}"


def _ratio(value: float, unit: float) -> str:
    return f"{value / unit:.{0 if value >= 10 * unit else 1}f}" if unit > 0 and math.isfinite(value) else "-"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"

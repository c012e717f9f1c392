"""What changed from one file of figures to another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..case import Case, Metric, Row, Table
from ..environment import hardware
from ..results import Results
from ..rows import figure


@dataclass(frozen=True)
class Change:
    """One metric of one row in both files.

    Attributes:
        case: its name.
        row: the settings and names that tell the row from others.
        metric: name.
        before: the figure in the first file; a list's median.
        after: in the second.
        worse: whether the change is a regression.
    """

    case: str
    row: str
    metric: str
    before: float
    after: float
    worse: bool


def changes(cases: Sequence[Case], a: Results, b: Results, threshold: float) -> list[Change]:
    """Metrics that differ by more than noise: exact ones at all, noisy ones by more than the factor."""
    found = []
    for case in cases:
        theirs = {_key(row, case): row for row in b.rows(case.name)}
        for row in a.rows(case.name):
            if (key := _key(row, case)) in theirs:
                found += list(_changed(case, key, row, theirs[key], threshold))
    return found


def lost(cases: Sequence[Case], a: Results, b: Results) -> list[str]:
    """Rows of the first file that the second lacks."""
    return [
        f"{case.name}: {key}"
        for case in cases
        for key in {_key(row, case): None for row in a.rows(case.name)}
        if key not in {_key(row, case) for row in b.rows(case.name)}
    ]


def _key(row: Row, case: Case) -> str:
    """What is not measured: settings and contender."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in case.metrics)


def _changed(case: Case, key: str, a: Row, b: Row, threshold: float) -> Iterator[Change]:
    for name, metric in case.metrics.items():
        if metric.better is None or name not in a or name not in b:
            continue
        before, after = figure(a[name]), figure(b[name])
        if before is None and after is None:
            continue
        # A figure that is missing is worse than any.
        worst = math.inf if metric.better == "lower" else -math.inf
        before, after = (worst if value is None else value for value in (before, after))
        if _differ(before, after, metric, threshold):
            worse = after > before if metric.better == "lower" else after < before
            yield Change(case.name, key, name, before, after, worse)


def _differ(before: float, after: float, metric: Metric, threshold: float) -> bool:
    if not metric.noisy or before <= 0 or after <= 0:
        return before != after
    return max(before / after, after / before) > threshold


def table(found: Sequence[Change]) -> Table:
    """Regressions, worst first; how many improvements there are is in the title."""
    worse = sorted((c for c in found if c.worse), key=_size, reverse=True)
    title = f"{len(worse)} regressions, {len(found) - len(worse)} improvements"
    lines = []
    for c in worse:
        figures = (f"{c.before:.4g}", f"{c.after:.4g}", f"{_size(c):.3g}")
        lines.append((f"{c.case}: {c.row}", c.metric, *figures))
    return Table(title, ("row", "metric", "before", "after", "times"), lines)


def _size(change: Change) -> float:
    """By what factor it differs."""
    if change.before > 0 and change.after > 0:
        return max(change.before / change.after, change.after / change.before)
    return math.inf


def warnings(a: Results, b: Results) -> list[str]:
    """What makes the files hard to compare."""
    found = []
    machines = [hardware(results.environments[0]) for results in (a, b)]
    if machines[0] != machines[1]:
        found.append(f"measured on {machines[0]} and on {machines[1]}: times tell little")
    if a.options != b.options:
        found.append(f"measured with {a.options} and with {b.options}")
    return found

"""Rows of JSON, looked at in groups."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from .case import Row


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a column, each once, in the order in which they come."""
    return list(dict.fromkeys(row[name] for row in rows))


def having(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def grouped(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """Rows that agree in these columns, in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[name] for name in names]), []).append(row)
    return list(groups.values())


def by_contender(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of one point."""
    return {row["contender"]: row for row in rows}


def figure(value: Any) -> float | None:
    """The number that stands for a metric: the median of a list; None where there is none."""
    if isinstance(value, list):
        return statistics.median(value) if value else None
    return None if value is None else float(value)

"""Rows of JSON, looked at in groups."""

from __future__ import annotations

import json

from ...case import Row


def grouped(rows: list[Row], *names: str) -> list[list[Row]]:
    """Rows that agree in these settings, in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[name] for name in names]), []).append(row)
    return list(groups.values())


def by_contender(rows: list[Row]) -> dict[str, Row]:
    """The rows of one point."""
    return {row["contender"]: row for row in rows}


def written(iterations: int | str | list[int]) -> str:
    """A schedule in words."""
    return " to ".join(map(str, iterations)) if isinstance(iterations, list) else str(iterations)

"""What the tests here count goes into a record, if `DEQLIB_RECORD` names one; see `tally`.

They run few of their cases where nothing else is said, and as many as docs/reliability.md tells with
`DEQLIB_THOROUGH=1`, as `make reliability` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import counted
import pytest
import torch

from benchmarks.environment import environment

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "viar"))  # where models of a few thousand parameters are made
_rows: list[counted.Row] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """times(few, many): how many cases to run."""
    thorough = os.environ.get("DEQLIB_THOROUGH") == "1"
    return lambda few, many: many if thorough else few


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """tally(table, what, **figures) counts for docs/reliability.md, and fails on what must not happen."""

    def count(table: str, what: str, **figures: int | float | str) -> None:
        row = counted.Row(table, what, figures)
        bad = {name: figures[name] for name in counted.MUST_BE_ZERO if figures.get(name)}
        assert not bad, f"{what}: {bad}"
        record_property("tally", [row.table, row.what, row.figures])

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where tests run in several processes, this is called in the one that started them."""
    if report.when == "call" and report.passed:
        test = report.nodeid
        _rows.extend(
            counted.Row(*value, test=test) for name, value in report.user_properties if name == "tally"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("DEQLIB_RECORD")
    if path and _rows and not hasattr(session.config, "workerinput"):
        where = environment(torch.device("cpu"))
        keep = ("commit", "date", "python", "cpu", "cores")
        counted.write(_rows, {**{key: where[key] for key in keep}, "torch": torch.__version__}, Path(path))

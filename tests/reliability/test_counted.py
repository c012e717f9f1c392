"""The page shows what was counted, and nothing that must not happen can be counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import counted
import pytest

FAULT = {"runs": 3, "lost": 0, "wrong": 0, "unclear": 0}


def test_the_page_shows_what_was_counted() -> None:
    assert counted.written(counted.PAGE.read_text(), counted.read()[1]) == counted.PAGE.read_text()


def test_every_promise_is_kept_by_a_test_and_every_test_keeps_one_that_is_made() -> None:
    assert set(counted.kept_by()) == set(counted.promised())


@pytest.mark.parametrize("name", ["lost", "wrong", "unclear"])
def test_what_must_not_happen_fails_the_test_that_counts_it(tally: Callable[..., None], name: str) -> None:
    with pytest.raises(AssertionError, match=f"a fault: {{'{name}': 1}}"):
        tally("faults", "a fault", **{**FAULT, name: 1})


def test_a_row_has_the_columns_of_its_table() -> None:
    with pytest.raises(ValueError, match=r"a fault: expected .*'lost'.*, got \['runs'\]"):
        counted.Row("faults", "a fault", {"runs": 3})


def test_rows_of_a_test_that_ran_again_take_the_place_of_those_it_had(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    rows = [counted.Row("faults", what, FAULT, test) for what, test in (("a", "one"), ("b", "two"))]
    counted.write(rows, {}, record)
    counted.write([counted.Row("faults", "c", FAULT, "one")], {"cores": 2}, record)
    where, found = counted.read(record)
    assert [(row.what, row.test) for row in found] == [("c", "one"), ("b", "two")]
    assert where == {"cores": 2}

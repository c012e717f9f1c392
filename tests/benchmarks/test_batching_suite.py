from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import show
from benchmarks.case import Row, Run
from benchmarks.measure import profiled
from benchmarks.suites import batching

RUN = Run(torch.device("cpu"), 1, True)
(CASE,) = batching.CASES


def figures(**changes: Any) -> list[Row]:
    """Rows of a point as they come out of a file."""
    settings = {"solver": "Picard", "batch": 32, "hard": 1, "width": 64, **changes}
    rows = json.loads(json.dumps(CASE.build(RUN, **settings), allow_nan=False))
    return [{**settings, **row} for row in rows]


def by_contender(rows: list[Row]) -> dict[str, Row]:
    return {row["contender"]: row for row in rows}


def changed(rows: list[Row], contender: str, **changes: Any) -> list[Row]:
    return [{**row, **changes} if row["contender"] == contender else row for row in rows]


def test_dropping_finished_samples_saves_most_of_the_work_where_one_is_hard() -> None:
    rows = figures()
    found = by_contender(rows)
    plain, compact = found["plain"], found["compact"]
    assert plain["steps_hard"] >= batching.STEPS_RATIO * plain["steps_easy"]
    assert compact["work"] <= batching.WORK_LIMIT * plain["work"]
    # One evaluation more than steps; the easy ones are dropped when as many were spent on holding them as the
    # last one takes, which asks the whole batch.
    assert compact["work"] <= 31 * (plain["steps_easy"] + 2) + plain["steps_hard"] + 1 + 32
    assert plain["work"] == 32 * plain["evaluations"] == 32 * (plain["steps_hard"] + 1)
    assert found["torchdeq"]["work"] == 32 * found["torchdeq"]["evaluations"]
    assert all(row["reached"] and len(row["seconds"]) == 1 for row in rows)
    bar = batching.bars(rows)[0]
    assert (bar.verdict, bar.limit) == ("pass", 0.35)
    assert bar.value == compact["work"] / plain["work"]


def test_the_work_counts_only_where_the_hard_sample_is_hard_and_all_arrive() -> None:
    rows = figures()
    easier = changed(rows, "plain", steps_hard=19 * by_contender(rows)["plain"]["steps_easy"])
    for broken in (easier, changed(rows, "plain", reached=False), changed(rows, "compact", reached=False)):
        assert batching.bars(broken)[0].value == math.inf
        assert batching.bars(broken)[0].verdict == "FAIL"
    elsewhere = [{**row, "hard": 2} for row in rows]
    assert batching.bars(elsewhere)[0].verdict == "not measured"
    worse = changed(elsewhere, "compact", work=10**6)
    assert [bar.verdict for bar in batching.bars(worse)] == ["not measured", "FAIL"]


def test_rates_are_such_that_hard_samples_take_as_long_as_is_said() -> None:
    # The residual of Picard falls by its rate a step, and is 1 + rate at most where it begins.
    found = by_contender(figures(width=256))["plain"]
    for kind, rate in (("easy", batching.EASY), ("hard", batching.HARD)):
        assert found[f"steps_{kind}"] == pytest.approx(math.log(batching.RTOL) / math.log(rate), abs=15)


@pytest.mark.parametrize(("hard", "missing"), [(0, "steps_hard"), (4, "steps_easy")])
@pytest.mark.parametrize("solver", ["Picard", "Anderson"])
def test_batches_of_one_kind_lack_the_other_and_are_not_cut_before_their_time(
    solver: str, hard: int, missing: str
) -> None:
    # As wide as the batch: the matrix that samples share must not be cut with them.
    rows = figures(solver=solver, batch=4, hard=hard, width=4)
    found = by_contender(rows)
    assert {name: row[missing] for name, row in found.items()} == dict.fromkeys(found)
    assert all(row["reached"] for row in rows)
    assert found["compact"]["work"] <= found["plain"]["work"]
    assert found["torchdeq"]["steps_easy"] is found["torchdeq"]["steps_hard"] is None
    assert "-" in batching.table(rows).lines[0]


def test_ratios_are_those_to_the_plain_solve() -> None:
    point = {
        "plain": {"work": 200, "seconds": [1.0, 4.0, 2.0]},
        "compact": {"work": 50, "seconds": [0.5, 1.0, 2.0]},
    }
    assert batching.ratios(point, "compact") == {"work": 0.25, "time": 0.5}


def test_the_grid_has_every_share_of_every_batch_and_the_point_with_the_bar() -> None:
    def hard(batch: int) -> list[int]:
        return [p["hard"] for p in CASE.grid if p["batch"] == batch and p["solver"] == "Picard"]

    assert hard(32) == [0, 1, 4, 8, 16, 32]
    assert hard(8) == [0, 1, 2, 4, 8]
    for points in (CASE.grid, CASE.quick):
        assert any(batching.BARRED.items() <= point.items() for point in points)


def test_table_picture_and_profile(tmp_path: Path) -> None:
    points = [{"batch": 4, "hard": hard, "width": 8} for hard in (0, 1, 4)]
    rows = [row for solver in ("Picard", "Anderson") for p in points for row in figures(solver=solver, **p)]
    table = CASE.table(rows)
    assert [line[0] for line in table.lines[:3]] == ["Picard, 0 of 4", "Picard, 1 of 4", "Picard, 4 of 4"]
    assert {len(line) for line in table.lines} == {len(table.head)}
    assert CASE.table(changed(rows, "torchdeq", reached=False)).lines[0][4].startswith("(")
    for row in rows:
        assert set(row) == {*CASE.grid[0], "contender", *CASE.metrics}
    show.draw(CASE, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert CASE.solve is not None
    settings = {"solver": "Picard", "batch": 4, "hard": 0, "width": 8}
    lines = profiled(CASE.solve(RUN, **settings), tmp_path / "trace.json").lines
    assert lines[-1][:2] == ("the cell", str(by_contender(figures(**settings))["compact"]["evaluations"]))

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS
from benchmarks.peak import peak_bytes
from benchmarks.report import Bar
from benchmarks.suites.solvers import compact, memory, overhead, robustness, solves
from benchmarks.timing import geometric_mean, interleaved, ratio
from deqlib import Solution, Status, fixed_point
from deqlib.testing import expanding, linear, mlp


def test_every_contender_solves_an_easy_problem_within_its_budget() -> None:
    rows = solves.measure([linear([0.5, -0.3, 0.1], batch=2)], rounds=1, max_steps=40)
    assert len(rows) == len(CONTENDERS) * len(solves.TOLERANCES)
    for row in rows:
        assert row.error is None
        assert row.reached
        assert row.relative_residual is not None
        assert row.relative_residual <= row.rtol * solves.ROUNDING
        assert 1 < row.evaluations <= 41
        assert len(row.times) == 1
    evaluations = {(row.contender, row.rtol): row.evaluations for row in rows}
    assert evaluations["deqlib Picard", 1e-3] == evaluations["torchdeq Picard", 1e-3]
    counted = {bar.name: bar.verdict for bar in solves.bars(rows, 40) if "time" not in bar.name}
    assert set(counted.values()) == {"pass"}


def test_every_contender_may_evaluate_as_often() -> None:
    rows = solves.measure([expanding(batch=2, width=24, rate=1.05)], rounds=0, max_steps=8, once=0)
    assert {row.evaluations for row in rows if not row.reached} == {9}


def test_a_contender_that_raises_loses_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setitem(CONTENDERS, "deqlib Broyden", broken)
    rows = solves.measure([linear([0.5], batch=1)], rounds=1, max_steps=30)
    raised = [row for row in rows if row.error]
    assert {row.contender for row in raised} == {"deqlib Broyden"}
    assert not any(row.reached for row in raised)
    assert solves.bars(rows, 30)[0].value == len(raised) == 2
    solves.table(rows)


def test_overhead_compares_equal_numbers_of_evaluations() -> None:
    rows = overhead.measure([mlp(batch=1, tokens=2, width=4)], rounds=1, steps=3, costly=0)
    assert rows["MLP"]["evaluations"] == {"tracked": 4, "fixed": 3}
    assert overhead.bars(overhead.measure([linear([0.5])], 1, 3))[0].verdict == "not measured"


def test_dropping_finished_samples_saves_most_of_the_work_where_one_is_hard() -> None:
    row = compact.measure(rounds=0)
    assert row["steps_ratio"] >= compact.STEPS_RATIO
    assert row["work_ratio"] <= compact.WORK_LIMIT
    assert compact.bars(row)[0].verdict == "pass"
    assert compact.bars({**row, "steps_ratio": 19.0})[0].verdict == "FAIL"


def test_peak_bytes_is_the_most_that_lives_at_once_beyond_what_was_there() -> None:
    before = torch.zeros(50_000)

    def compute() -> torch.Tensor:
        first = before + 1  # 1 alive
        second = torch.empty(2 * first.numel())  # 3 alive
        del first, second
        third = torch.empty_like(before)  # 1 alive
        return third.view(-1)

    # A scalar operand is a tensor of a few bytes while it is used.
    assert 3 * before.nbytes <= peak_bytes(compute) < 3 * before.nbytes + 100


@pytest.mark.parametrize("memory_length", memory.MEMORIES)
def test_anderson_peaks_at_two_states_a_column_and_four(memory_length: int) -> None:
    row = memory.measure(width=16384, memories=(memory_length,))[memory_length]
    fewest, most = row["steps"]
    assert fewest < most
    assert most >= 3 * memory_length
    assert row["worse_iterates"] > 0
    bar = memory.bars({memory_length: row})[0]
    assert bar.limit == 2 * memory_length + 4
    assert bar.verdict == "pass"


@pytest.mark.parametrize("largest_exponent", [12, robustness.LARGEST_EXPONENT])
def test_random_problems_show_no_fault(largest_exponent: float) -> None:
    found = robustness.measure(150, largest_exponent=largest_exponent)
    assert found["failures"] == []
    assert robustness.bars(found)[0].verdict == "pass"
    assert set(found["endings"]) == {"CONVERGED", "MAX_STEPS", "STALLED", "DIVERGED"}


def raising(*_: Any, **__: Any) -> Solution:
    raise ZeroDivisionError("no")


def endless(f: Any, z0: torch.Tensor, args: tuple[Any, ...], **_: Any) -> Solution:
    while True:
        f(z0, *args)


def returning_the_start(f: Any, z0: torch.Tensor, *args: Any, **settings: Any) -> Solution:
    return replace(fixed_point(f, z0, *args, **settings), value=z0)


def returning_nan(*args: Any, **settings: Any) -> Solution:
    solution = fixed_point(*args, **settings)
    return replace(solution, value=solution.value * torch.nan)


def claiming_success(*args: Any, **settings: Any) -> Solution:
    solution = fixed_point(*args, **settings)
    return replace(solution, status=torch.full_like(solution.status, int(Status.CONVERGED)))


@pytest.mark.parametrize(
    ("solve", "fault"),
    [
        (raising, "raises"),
        (endless, "hangs"),
        (returning_the_start, "worse than the best seen"),
        (returning_nan, "not finite"),
        (claiming_success, "inconsistent"),
    ],
)
def test_a_solver_with_a_fault_is_caught(solve: Any, fault: str) -> None:
    found = robustness.measure(40, largest_exponent=0, solve=solve)
    assert found["faults"][fault] > 0
    assert robustness.bars(found)[0].verdict == "FAIL"
    robustness.table(found)


def test_a_case_can_be_run_again_by_its_seed() -> None:
    one, again = robustness.draw(17), robustness.draw(17)
    assert str(one) == str(again)
    assert torch.equal(one.x, again.x)
    assert [failure["seed"] for failure in robustness.measure(2, 5, solve=raising)["failures"]] == [5, 6]


def test_contenders_take_turns_and_slow_ones_run_once() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b", "slow")}
    times = interleaved(runs, 2, limit=1.0, warm_up={"a": 0.1, "b": 0.1, "slow": 5.0})
    assert calls == ["a", "b", "a", "b"]
    assert times["slow"] == [5.0]
    assert ratio([5.0], [1.0, 2.0, 5.0]) == 2.5
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_a_bar_without_a_figure_is_not_measured() -> None:
    assert [Bar("", value, 1).verdict for value in (1, 1.1, float("nan"))] == ["pass", "FAIL", "not measured"]
    assert Bar("", float("nan"), 1).record()["value"] is None


def test_the_command_writes_figures_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "benchmarks.suites.solvers.suite", lambda: [linear([0.5, 0.1], batch=2), linear([0.3], name="other")]
    )
    out = tmp_path / "folder" / "solvers.json"
    settings = ["--rounds", "1", "--max-steps", "30", "--problems", "linear", "--cases", "3"]
    parts = ["--part", "solves", "robustness", "--largest-exponent", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "solvers", *settings, *parts, "--out", str(out)])
    main()
    saved = json.loads(out.read_text())
    assert saved["machine"]["torch"] == torch.__version__
    assert {row["problem"] for row in saved["parts"]["solves"]} == {"linear"}
    assert saved["parts"]["robustness"]["cases"] == 3
    assert all(bar["verdict"] for bar in saved["bars"])
    assert out.with_suffix(".png").stat().st_size > 1000


def test_an_unknown_problem_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.solvers.suite", lambda: [linear([0.5])])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "solvers", "--problems", "nothing"])
    with pytest.raises(SystemExit, match="nothing"):
        main()

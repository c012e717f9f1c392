from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import maps, show
from benchmarks.baselines import torchdeq
from benchmarks.case import Bar, Case, Row, Run
from benchmarks.measure import (
    Watched,
    cells,
    geometric_mean,
    interleaved,
    num_kernels,
    peak_bytes,
    profiled,
    ratio,
    worst_residual,
)
from benchmarks.suites import solvers
from benchmarks.suites.solvers import (
    contenders,
    faults,
    memory,
    outside,
    overhead,
    random_solves,
    robustness,
    small,
    solves,
    traces,
)
from benchmarks.suites.solvers.contenders import CONTENDERS, ROUNDING, SOLVERS, stopping
from deqlib import Picard, Solution, Status, fixed_point
from deqlib.testing import Problem, expanding, linear, mlp, suite

CPU = torch.device("cpu")
RUN = Run(CPU, 1, True)
EASY = {"problem": "linear", "max_evaluations": 41}


def figures(case: Case, run: Run = RUN, **settings: Any) -> list[Row]:
    """Rows of a point as they come out of a file."""
    point = json.loads(json.dumps([settings, list(case.build(run, **settings))], allow_nan=False))
    return [{**point[0], **row} for row in point[1]]


def value(bars: list[Bar], name: str) -> float:
    return next(bar.value for bar in bars if bar.name == name)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Measure these problems by their names."""

    def use(*those: Problem) -> None:
        monkeypatch.setattr(maps, "by_name", lambda: {problem.name: problem for problem in those})

    return use


def test_the_names_are_those_of_the_suite() -> None:
    assert [problem.name for problem in suite()] == list(maps.NAMES)
    assert list(maps.by_name()) == list(maps.SOLVED)
    assert set(maps.QUICK) < set(maps.NAMES)
    assert maps.named("linear, non-normal", CPU).name == "linear, non-normal"


def test_the_attention_cell_is_the_one_of_pytorchs_modules() -> None:
    problem = maps.attention(batch=2, tokens=3, width=8)
    torch.manual_seed(1)
    layer, norm = torch.nn.MultiheadAttention(8, 4, batch_first=True), torch.nn.LayerNorm(8)
    for weight in layer.parameters():
        if weight.dim() == 2:
            weight.data.mul_(1.2)
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(problem.inputs[0], x)
    torch.testing.assert_close(problem.f(z), norm(x + 2 * layer(z, z, z)[0]))


# solves -------------------------------------------------------------------------------------------------


def test_every_contender_solves_an_easy_problem_within_its_budget(use: Callable[..., None]) -> None:
    use(linear([0.5, -0.3, 0.1], batch=2))
    rows = [row for rtol in solves.TOLERANCES for row in figures(solves.CASE, rtol=rtol, **EASY)]
    assert len(rows) == len(CONTENDERS) * len(solves.TOLERANCES)
    for row in rows:
        assert row["error"] is None
        assert row["reached"]
        assert row["relative_residual"] <= row["rtol"] * ROUNDING
        assert 1 < row["evaluations"] <= 41
        assert len(row["seconds"]) == 1
    evaluations = {(row["contender"], row["rtol"]): row["evaluations"] for row in rows}
    assert evaluations["deqlib Picard", 1e-3] == evaluations["torchdeq Picard", 1e-3]
    counted = {bar.name: bar.verdict for bar in solves.bars(rows) if "time" not in bar.name}
    assert set(counted.values()) == {"pass"}
    assert [line[0] for line in solves.table(rows).lines] == ["linear 1e-03", "linear 1e-05"]


def test_every_contender_may_evaluate_as_often(use: Callable[..., None]) -> None:
    use(expanding(batch=2, width=24, rate=1.05))
    rows = figures(solves.CASE, problem="expanding", rtol=1e-3, max_evaluations=9)
    assert {row["evaluations"] for row in rows if not row["reached"]} == {9}
    assert {row["contender"].split()[0] for row in rows if not row["reached"]} == {
        "deqlib",
        "torchdeq",
        "scipy",
    }


def test_scipy_stops_at_the_first_iterate_at_which_every_sample_meets_the_tolerance() -> None:
    problem = linear(torch.linspace(-0.9, 0.9, 32), batch=4)
    for name in ("scipy Anderson", "scipy Broyden"):  # without a line search every evaluation is an iterate
        watched = Watched(problem.cell)
        with torch.no_grad():
            found = CONTENDERS[name](replace(problem, cell=watched), 1e-3, 100)
        assert float(problem.residuals(found)[1].max()) == pytest.approx(watched.residuals[-1], rel=1e-3)
        assert watched.residuals[-1] <= 1e-3 < min(watched.residuals[:-1])


def test_a_contender_that_raises_loses_its_case_alone(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setitem(CONTENDERS, "deqlib Broyden", broken)
    use(linear([0.5], batch=1))
    rows = figures(solves.CASE, rtol=1e-3, **EASY)
    raised = [row for row in rows if row["error"]]
    assert [row["contender"] for row in raised] == ["deqlib Broyden"]
    assert not raised[0]["reached"]
    assert solves.bars(rows)[0].value == 1
    assert "raised" in solves.table(rows).lines[0]
    seen = {row["contender"] for row in figures(traces.CASE, rtol=1e-3, **EASY)}
    assert set(CONTENDERS) - seen == {"deqlib Broyden"}


def test_scipy_is_left_out_where_the_state_is_large_and_the_row_says_so(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(contenders, "SCIPY_LARGEST", 3)
    use(linear([0.5, 0.1], batch=2))
    rows = figures(solves.CASE, rtol=1e-3, **EASY)
    left_out = {row["contender"]: row for row in rows if row["evaluations"] is None}
    assert set(left_out) == {name for name in CONTENDERS if name.startswith("scipy")}
    assert all("4 numbers" in row["error"] and row["seconds"] == [] for row in left_out.values())
    assert solves.table(rows).lines[0][-len(left_out) :] == ("-",) * len(left_out)
    assert value(solves.bars(rows), "solves of deqlib that raise") == 0
    assert not set(solves.factors(rows, "time")) & set(left_out)
    assert not {row["contender"] for row in figures(traces.CASE, rtol=1e-3, **EASY)} & set(left_out)
    show.draw(solves.CASE, rows, tmp_path / "solves.png")
    on_gpu: Any = SimpleNamespace(z0=SimpleNamespace(is_cuda=True, numel=lambda: 2))
    assert contenders.not_run("scipy Broyden", on_gpu) == "not run: scipy computes on a CPU"
    assert contenders.not_run("deqlib Broyden", on_gpu) is None


def test_without_torchdeq_the_others_are_measured_and_its_rows_say_why(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torchdeq, "torchdeq")
    assert not torchdeq.is_installed()
    use(linear([0.5, 0.1], batch=2))
    rows = figures(solves.CASE, rtol=1e-3, **EASY)
    left_out = {row["contender"]: row for row in rows if row["evaluations"] is None}
    assert set(left_out) == {name for name in CONTENDERS if name.startswith("torchdeq")}
    assert {row["error"] for row in left_out.values()} == {"not run: torchdeq is not installed"}
    assert not [bar for bar in solves.bars(rows) if "torchdeq" in bar.name and bar.verdict == "FAIL"]
    assert solves.table(rows).lines
    assert not {row["contender"] for row in figures(traces.CASE, rtol=1e-3, **EASY)} & set(left_out)
    rows = figures(outside.CASE, **SMALL["outside"])
    assert [row["contender"] for row in rows if row["error"]] == ["torchdeq Anderson", "torchdeq Broyden"]
    assert {row["error"] for row in rows} == {None, "not run: torchdeq is not installed"}
    assert [bar.verdict for bar in outside.bars(rows)] == ["not measured"] * 6
    with pytest.raises(ModuleNotFoundError, match="pip install torchdeq"):
        torchdeq.solve("Picard", linear([0.5], batch=1), 1e-3, 5)


# Outside of the cell


def test_turns_take_time_and_change_nothing_of_the_map() -> None:
    plain, turned = (outside.turning(CPU, cell_ms, 2, 1, 8) for cell_ms in (0.0, 0.05))
    assert turned.cell.num_turns >= 1
    for problem in (plain, turned):
        jacobian = torch.func.jacrev(problem.f)(problem.z0).view(16, 16).double()
        found = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
        rates = torch.linspace(outside.FASTEST, outside.SLOWEST, 8).double().repeat_interleave(2)
        torch.testing.assert_close(found, rates, atol=1e-5, rtol=0)


def test_kernels_are_operations_that_make_values_and_the_cells_own_are_taken_off() -> None:
    x = torch.randn(4, 3)
    assert num_kernels(lambda: (x.t() @ x).view(9)[:2].exp(), CPU) == 2
    rows = {row["contender"]: row for row in figures(outside.CASE, **SMALL["outside"])}
    assert rows[outside.BARE]["kernels"] == 1
    with_turns = figures(outside.CASE, **{**SMALL["outside"], "cell_ms": 0.05})
    for row in with_turns[1:]:
        assert row["kernels"] == rows[row["contender"]]["kernels"]  # whatever the cell does
    assert with_turns[0]["kernels"] > 1


def made_up_outside(**changes: dict[str, Any]) -> list[Row]:
    """Rows of full size: cells of 1 ms, and solves of ten that take a tenth longer."""
    usual = {"relative_residual": 1e-6, "reached": True, "error": None, "evaluations": 10, "kernels": 5}
    times = {outside.BARE: 0.01, "deqlib Anderson": 0.011, "torchdeq Anderson": 0.03}
    return [
        {
            **outside.FULL,
            "rtol": 1e-5,
            "contender": name,
            **usual,
            "seconds": [seconds] * 2,
            **changes.get(name, {}),
        }
        for name, seconds in times.items()
    ]


def test_time_outside_is_that_of_a_solve_less_its_evaluations() -> None:
    share, peer, kernels, *broyden = outside.bars(made_up_outside())
    assert share.value == pytest.approx(0.1)
    assert peer.value == pytest.approx(11 / 30)
    assert kernels.value == 5
    assert [bar.verdict for bar in (share, peer, kernels)] == ["pass"] * 3
    assert [bar.verdict for bar in broyden] == ["not measured"] * 3
    late = {"torchdeq Anderson": {"reached": False}}
    assert outside.bars(made_up_outside(**late))[1].note == "torchdeq does not arrive: a bound"
    missed = {"deqlib Anderson": {"reached": False}}
    assert outside.bars(made_up_outside(**missed))[1].verdict == "not measured"
    small_cell = [{**row, "cell_ms": 0.0} for row in made_up_outside()]
    assert [bar.verdict for bar in outside.bars(small_cell)] == ["not measured"] * 6
    line = outside.table(made_up_outside()).lines[1]
    assert line[3] == "100 (10%)"


def test_bars_of_counts_break_where_deqlib_does_worse(use: Callable[..., None]) -> None:
    use(linear([0.5, -0.3], batch=2))
    rows = figures(solves.CASE, rtol=1e-5, **EASY)
    best = {row["contender"]: row["evaluations"] for row in rows}

    def broken(contender: str, **changes: Any) -> set[str]:
        changed = [{**row, **changes} if row["contender"] == contender else row for row in rows]
        failed = {bar.name for bar in solves.bars(changed) if bar.verdict == "FAIL"}
        return {name for name in failed if ", time" not in name}

    most = max(best["deqlib Picard"], best["torchdeq Anderson"])
    assert broken("deqlib Anderson", evaluations=most + 3) == {
        "Anderson needs more evaluations than torchdeq's",
        "Anderson needs more evaluations than Picard + 2",
    }
    assert broken("deqlib Anderson", reached=False) == {
        "torchdeq Anderson arrives, deqlib's does not",
        "Picard arrives, Anderson does not",
    }
    fewest = min(n for name, n in best.items() if n and name != "deqlib Auto" and "scipy" not in name)
    assert broken("deqlib Auto", evaluations=int(1.5 * fewest) + 10) == set()
    assert broken("deqlib Auto", evaluations=int(1.5 * fewest) + 11) == {
        "Auto needs more than 1.5 times the fewest evaluations of any solver + 10"
    }
    assert broken("deqlib Auto", reached=False) == {"some solver arrives, Auto does not"}
    assert broken("deqlib Broyden", reached=False) == {"torchdeq Broyden arrives, deqlib's does not"}


def test_bars_of_times_are_geometric_means_over_solves() -> None:
    def row(problem: str, contender: str, seconds: float, reached: bool = True) -> Row:
        return {
            "problem": problem,
            "rtol": 1e-5,
            "max_evaluations": 9,
            "contender": contender,
            "numbers": 10 if problem == "a" else solves.LARGE,
            "evaluations": 5,
            "reached": reached,
            "seconds": [seconds],
            "error": None,
        }

    rows = [
        row(problem, name, seconds.get(name, 1.0), reached=(problem, name) != ("b", "torchdeq Anderson"))
        for problem, seconds in (("a", {"deqlib Anderson": 2.0}), ("b", {"deqlib Anderson": 0.125}))
        for name in CONTENDERS
    ]
    bars = solves.bars(rows)
    name = "deqlib / torchdeq {} where both arrive"
    assert value(bars, name.format("Anderson") + ", time, geometric mean") == 2  # not of "b"
    assert value(bars, name.format("Anderson") + ", time, worst") == 2
    assert value(bars, name.format("Broyden") + ", time, geometric mean") == 1
    assert value(bars, name.format("Broyden") + ", 100,000 numbers and more, time, geometric mean") == 1
    assert value(bars, "Auto / the fastest solver of each problem, time, worst") == 8
    assert value(bars, "Auto / torchdeq's fastest solver of each problem, time, geometric mean") == 1
    limits = [bar.limit for bar in bars if bar.name.endswith("geometric mean")]
    assert limits == [0.57, 0.25, 0.15, 1.25, 0.45]
    # The best of "a" takes a second, that of "b" an eighth.
    assert solves.factors(rows, "time")["torchdeq Anderson"] == [1, math.inf]
    assert solves.factors(rows, "time")["scipy Anderson"] == [1, 8]
    assert solves.factors(rows, "evaluations")["deqlib Anderson"] == [1, 1]


def test_a_profile_of_a_solve_tells_its_cell(use: Callable[..., None], tmp_path: Path) -> None:
    use(linear([0.5, 0.1], batch=2))
    assert solves.CASE.solve is not None
    table = profiled(solves.CASE.solve(RUN, rtol=1e-3, **EASY), tmp_path / "trace.json")
    evaluations = next(r for r in figures(solves.CASE, rtol=1e-3, **EASY) if r["contender"] == "deqlib Auto")
    assert table.lines[-1][:2] == ("the cell", str(evaluations["evaluations"]))


# traces -------------------------------------------------------------------------------------------------


def test_traces_of_picard_are_those_of_a_geometric_series() -> None:
    watched = Watched(lambda z: z / 2 + 1)
    rule = stopping(1e-30, 6)
    with torch.no_grad():
        fixed_point(watched, torch.zeros(3, 2), solver=Picard(), stopping=rule, on_failure="ignore")
    expected = [0.5**k / (2 - 0.5**k) for k in range(6)]
    assert watched.residuals == pytest.approx(expected, rel=1e-6)


def test_everybody_is_seen_at_every_evaluation(use: Callable[..., None]) -> None:
    problem = linear(torch.linspace(-0.9, 0.8, 12), batch=3)
    use(problem)
    rows = figures(traces.CASE, rtol=1e-3, **EASY)
    counted = {row["contender"]: row["evaluations"] for row in figures(solves.CASE, rtol=1e-3, **EASY)}
    assert {row["contender"]: len(row["residuals"]) for row in rows} == counted
    for row in rows:
        assert len(row["seconds"]) == len(row["residuals"])
        assert row["seconds"] == sorted(row["seconds"])
        assert row["seconds"][0] >= 0
    ours = next(row for row in rows if row["contender"] == "deqlib Anderson")
    solution = fixed_point(
        problem.cell, problem.z0, problem.inputs, solver=SOLVERS["Anderson"], stopping=stopping(1e-3, 41)
    )
    assert solution.trace is not None
    assert ours["residuals"] == pytest.approx(solution.trace.amax(1).tolist(), rel=1e-2)


def test_the_worst_sample_decides_and_recording_is_off_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def cell(z: Tensor) -> Tensor:
        nonlocal now
        now += 1
        return z + torch.tensor([[1.0], [3.0]])

    def slow(z: Tensor, fz: Tensor) -> float:
        nonlocal now
        now += 100
        return worst_residual(z, fz)

    monkeypatch.setattr(cells, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(cells, "worst_residual", slow)
    watched = Watched(cell, begin=now)
    for _ in range(3):
        watched(torch.tensor([[1.0], [1.0]]))
    assert watched.seconds == [1, 2, 3]
    assert watched.residuals == [0.75] * 3


def test_residuals_that_are_not_finite_do_not_count_as_the_smallest() -> None:
    row = {
        "problem": "a",
        "rtol": 1,
        "contender": "x",
        "residuals": [2.0, None, 3.0, 1.0],
        "seconds": [1] * 4,
    }
    assert traces.smallest(row) == [2, 2, 2, 1]
    nothing = {**row, "contender": "y", "residuals": [None] * 4}
    assert traces.table([row, nothing]).lines == [("a", "1e+00 / 1,000", "none is finite")]


# overhead and memory ------------------------------------------------------------------------------------


def test_overhead_compares_equal_numbers_of_evaluations(use: Callable[..., None]) -> None:
    calls = 0
    problem = mlp(batch=1, tokens=2, width=4)

    def cell(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.cell(*arguments)

    use(replace(problem, cell=cell))
    rows = figures(overhead.CASE, problem="MLP", max_steps=3)
    assert {row["contender"]: row["evaluations"] for row in rows} == {
        "tracked": 4,
        "tracked, bare loop": 4,
        "fixed": 3,
        "fixed, bare loop": 3,
    }
    # The solve that counts steps, two that count evaluations, warm-up and one round of all, five alone.
    assert calls == 4 + (4 + 3) + 2 * (4 + 4 + 3 + 3) + 5


def test_overhead_is_judged_by_the_worst_of_the_costly_cells() -> None:
    def rows(problem: str, evaluation: float, tracked: float, fixed: float) -> list[Row]:
        seconds = {"tracked": tracked, "tracked, bare loop": 1, "fixed": fixed, "fixed, bare loop": 2}
        return [
            {
                "problem": problem,
                "contender": name,
                "evaluations": 3,
                "seconds": [taken],
                "evaluation_seconds": evaluation,
            }
            for name, taken in seconds.items()
        ]

    cheap = rows("cheap", overhead.COSTLY / 2, 9, 9)
    assert [bar.verdict for bar in overhead.bars(cheap)] == ["not measured"] * 2
    both = [*cheap, *rows("one", overhead.COSTLY, 1.1, 2.2), *rows("two", 1.0, 1.2, 2.0)]
    assert [(bar.value, bar.note, bar.verdict) for bar in overhead.bars(both)] == [
        (1.2, "two", "FAIL"),
        (1.1, "one", "FAIL"),
    ]
    assert [bar.limit for bar in overhead.bars(both)] == [1.12, 1.03]
    assert overhead.table(both).lines[0] == ("cheap", "1.00", "3", "9.00", "4.50")


def test_peak_bytes_is_the_most_that_lives_at_once_beyond_what_was_there() -> None:
    before = torch.zeros(50_000)

    def compute() -> Tensor:
        first = before + 1  # 1 alive
        second = torch.empty(2 * first.numel())  # 3 alive
        del first, second
        third = torch.empty_like(before)  # 1 alive
        return third.view(-1)

    # A scalar operand is a tensor of a few bytes while it is used.
    assert 3 * before.nbytes <= peak_bytes(compute) < 3 * before.nbytes + 100


@pytest.mark.parametrize("length", [2, 5, 8])
def test_anderson_peaks_at_two_and_a_half_states_a_column_and_four(length: int) -> None:
    rows = figures(memory.CASE, memory=length, batch=16, width=16384)
    row = rows[0]
    assert row["fewest_steps"] < row["most_steps"]
    assert row["most_steps"] >= 3 * length
    assert row["worse_iterates"] > 0
    assert row["states"] * 16 * 16384 * 4 == row["peak_bytes"]
    assert row["states"] > 2 * length
    bar = memory.bars(rows)[0]
    assert bar.limit == 2 * length + length // 2 + 4
    assert bar.verdict == "pass"
    assert memory.bars([{**row, "states": bar.limit + 0.2}])[0].verdict == "FAIL"


# robustness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest_exponent", [12, random_solves.LARGEST_EXPONENT])
def test_random_problems_show_no_fault(largest_exponent: float) -> None:
    rows = figures(robustness.CASE, seed_from=0, seeds=150, largest_exponent=largest_exponent)
    assert rows[0]["failures"] == []
    assert robustness.bars(rows)[0].verdict == "pass"
    assert set().union(*rows[0]["endings"].values()) == {"CONVERGED", "MAX_STEPS", "STALLED", "DIVERGED"}
    samples = sum(len(random_solves.draw(seed).z0) for seed in range(150))
    assert sum(sum(ended.values()) for ended in robustness.endings(rows).values()) == samples


def raising(*_: Any, **__: Any) -> Solution:
    raise ZeroDivisionError("no")


def endless(f: Any, z0: Tensor, args: tuple[Any, ...], **_: Any) -> Solution:
    while True:
        f(z0, *args)


def returning_the_start(f: Any, z0: Tensor, *args: Any, **settings: Any) -> Solution:
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
def test_a_solver_with_a_fault_is_caught_and_its_seed_shows_it_again(solve: Any, fault: str) -> None:
    settings = {"seed_from": 0, "seeds": 40, "largest_exponent": 0}
    found = robustness.build(RUN, **settings, solve=solve)
    rows = [{**settings, **row} for row in json.loads(json.dumps(found, allow_nan=False))]
    assert rows[0]["faults"][fault] > 0
    assert robustness.bars(rows)[0].verdict == "FAIL"
    line = next(line for line in robustness.table(rows).lines if line[0] == fault)
    failure = next(f for f in rows[0]["failures"] if fault in [kind for kind, _ in f["faults"]])
    assert line[2].startswith(f"seed {failure['seed']}: ")
    drawn = random_solves.draw(failure["seed"], rows[0]["largest_exponent"])
    assert str(drawn) == failure["problem"]
    assert [list(told) for told in faults.faults(drawn, solve)] == failure["faults"]


def test_a_problem_can_be_drawn_again_by_its_seed() -> None:
    one, again = random_solves.draw(17), random_solves.draw(17)
    assert str(one) == str(again)
    assert torch.equal(one.x, again.x)
    found = robustness.build(RUN, seed_from=5, seeds=2, largest_exponent=0, solve=raising)
    assert [failure["seed"] for failure in found[0]["failures"]] == [5, 6]


def test_chunks_of_seeds_add_up_to_ten_thousand() -> None:
    seeds = [s for point in robustness.CASE.grid for s in range(point["seed_from"], point["seed_from"] + 500)]
    assert seeds == list(range(10_000))
    assert {point["seeds"] for point in robustness.CASE.grid} == {500}
    chunks = [
        {"seeds": 3, "faulty": 0, "faults": dict.fromkeys(faults.FAULTS, 0), "failures": [], "endings": e}
        for e in ({"linear": {"CONVERGED": 2}}, {"linear": {"CONVERGED": 1, "STALLED": 4}})
    ]
    assert robustness.endings(chunks) == {"linear": {"CONVERGED": 3, "STALLED": 4}}
    assert robustness.bars(chunks)[0].note == "of 6"


# what suites share --------------------------------------------------------------------------------------


def test_contenders_take_turns_in_another_order_every_round_and_slow_ones_run_once() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c", "slow")}
    warm_up = {"a": 0.1, "b": 0.1, "c": 0.1, "slow": 5.0}
    times = interleaved(runs, 20, limit=1.0, warm_up=warm_up)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 20
    assert {tuple(sorted(order)) for order in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 3
    assert {name: len(found) for name, found in times.items()} == {"a": 20, "b": 20, "c": 20, "slow": 1}
    assert times["slow"] == [5.0]
    assert ratio([5.0], [1.0, 2.0, 5.0]) == 2.5
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_what_prepares_a_turn_comes_right_before_it_and_is_off_the_clock() -> None:
    events: list[str] = []

    def prepare(name: str) -> None:
        events.append(f"prepare {name}")
        time.sleep(0.05)

    runs = {name: partial(events.append, f"run {name}") for name in ("a", "b")}
    times = interleaved(runs, 3, prepare=prepare)
    assert len(events) == 2 * 2 * (3 + 1)  # the first round warms up
    for before, after in zip(events[::2], events[1::2], strict=True):
        assert before.removeprefix("prepare ") == after.removeprefix("run ")
    assert max(max(found) for found in times.values()) < 0.05


# small --------------------------------------------------------------------------------------------------


def test_a_training_step_is_beside_a_bare_loop_of_as_many_evaluations_and_products() -> None:
    rows = {row["contender"]: row for row in figures(small.CASE, what="layer", batch=4, width=3)}
    assert rows["default"]["evaluations"] == rows["bare loop"]["evaluations"] > 3
    assert rows["default"]["products"] == rows["bare loop"]["products"] > 3
    (bar,) = small.bars([{"what": "layer", "batch": 4, "width": 3, **row} for row in rows.values()])
    assert bar.value == pytest.approx(ratio(*(rows[name]["seconds"] for name in ("default", "bare loop"))))


def test_a_solve_of_many_numbers_tells_its_time_and_its_peak() -> None:
    (row,) = figures(small.CASE, what="numbers", batch=3000, width=1)
    assert row["converged"] == 3000
    assert row["states"] > 1
    bars = small.bars([{"what": "numbers", "batch": 3000, "width": 1, **row}])
    assert [bar.limit for bar in bars] == [1.0, 10.0]


def test_a_bar_without_a_figure_is_not_measured() -> None:
    assert [Bar("", value, 1).verdict for value in (1, 1.1, float("nan"))] == ["pass", "FAIL", "not measured"]
    assert Bar("", float("nan"), 1).record()["value"] is None


SMALL: dict[str, dict[str, Any]] = {
    "solves": {"rtol": 1e-3, **EASY},
    "traces": {"rtol": 1e-3, **EASY},
    "overhead": {"problem": "linear", "max_steps": 3},
    "outside": {
        "cell_ms": 0.0,
        "batch": 2,
        "tokens": 1,
        "width": 64,  # of as many rates, so that nobody arrives while kernels are counted
        "rtol": 1e-3,
        "max_evaluations": 41,
    },
    "small": {"what": "layer", "batch": 4, "width": 3},
    "memory": {"memory": 2, "batch": 2, "width": 16},
    "robustness": {"seed_from": 0, "seeds": 5, "largest_exponent": 0},
}


@pytest.mark.parametrize("case", solvers.CASES, ids=lambda case: case.name)
def test_every_case_shows_a_table_and_a_picture_of_rows_with_all_metrics(
    case: Case, use: Callable[..., None], tmp_path: Path
) -> None:
    if case is not outside.CASE:
        use(linear([0.5, 0.1], batch=2))
    rows = figures(case, **SMALL[case.name])
    for point in (*case.grid, *case.quick):
        assert set(point) == set(SMALL[case.name])
    for row in rows:
        assert set(row) == {*SMALL[case.name], *case.metrics} | (row.keys() & {"contender"})
    table = case.table(rows)
    assert {len(line) for line in table.lines} == {len(table.head)}
    show.draw(case, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000

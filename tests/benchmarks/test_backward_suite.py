from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.case import Case, Row, Run
from benchmarks.measure import marks, profiled
from benchmarks.results import Results
from benchmarks.show import draw
from benchmarks.suites import backward
from benchmarks.suites.backward import (
    accuracy,
    adjoints,
    contenders,
    cosine,
    memory,
    modes,
    random_maps,
    times,
)
from deqlib import JFB, ImplicitDifferentiation, Picard, Stopping, Unroll, fixed_point
from deqlib.counting import CountedCell
from deqlib.diagnostics import saved_bytes
from deqlib.testing import Problem, expanding, linear, mlp, suite

TINY = {"tokens": 3, "width": 8, "gain": 0.7}
POINTS: dict[str, list[dict[str, Any]]] = {
    "time": [{"problem": "tiny", "target": 1e-2}, {"problem": "tiny", "target": 1e-5}],
    "modes": [{"problem": "tiny", "batch": 3}],
    "accuracy": [{"first_seed": 0, "count": 2}, {"first_seed": 2, "count": 2}],
    "cosine": [{"radius": 0.5, "count": 2}, {"radius": 0.9, "count": 2}],
    "memory": [{"batch": 1, "width": 4, "steps": 1}, {"batch": 1, "width": 4, "steps": 3}],
}
RUN = Run(torch.device("cpu"), 2, True)


def tiny(batch: int = 2, dtype: torch.dtype = torch.float64) -> Problem:
    return mlp(batch=batch, **TINY, dtype=dtype, name="tiny")


@pytest.fixture(autouse=True)
def _tiny_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(times.PROBLEMS, "tiny", tiny)
    monkeypatch.setitem(modes.PROBLEMS, "tiny", tiny)


def measured(case: Case, *points: dict[str, Any], run: Run = RUN) -> list[Row]:
    """Rows as they come back from a file."""
    results = Results("backward", {}, [{}])
    for settings in points:
        results.add(case.name, settings, 0.0, case.build(run, **settings))
    results.points = json.loads(json.dumps(results.points, allow_nan=False))
    return results.rows(case.name)


@cache
def figures(name: str) -> list[Row]:
    """Rows of small points of a case, measured once."""
    (case,) = (case for case in backward.CASES if case.name == name)
    return measured(case, *POINTS[name])


@pytest.fixture
def rows(_tiny_problem: None) -> list[Row]:
    return figures("time")


@pytest.fixture
def mode_rows(_tiny_problem: None) -> dict[str, Row]:
    return {row["contender"]: row for row in figures("modes")}


def by_name(rows: list[Row], target: float) -> dict[str, Row]:
    return {row["contender"]: row for row in rows if row["target"] == target}


# The suite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", backward.CASES, ids=lambda case: case.name)
def test_every_case_is_shown_from_its_file(case: Case, tmp_path: Path) -> None:
    found = figures(case.name)
    for settings in (*case.grid, *case.quick):
        assert set(settings) == set(POINTS[case.name][0])
        assert json.loads(json.dumps(settings)) == settings
    metrics = [set(row) - set(case.metrics) for row in found]
    assert metrics == [metrics[0]] * len(found)
    keys = [tuple(row[name] for name in sorted(metrics[0])) for row in found]
    assert len(set(keys)) == len(keys)  # what is not measured tells rows apart
    table = case.table(found)
    assert {len(line) for line in table.lines} == {len(table.head)}
    json.dumps([bar.record() for bar in case.bars(found)], allow_nan=False)
    draw(case, found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_the_problems_are_those_of_the_solver_suite_and_two_more() -> None:
    names = [problem.name for problem in suite()]
    assert list(times.PROBLEMS)[: len(names)] == names
    assert times.PROBLEMS["mixer"]().name == "mixer"
    assert set(times.PROBLEMS) - set(names) == {"MLP 32x1x256", "transformer, easy", "tiny"}


# Time ---------------------------------------------------------------------------------------------------


def test_every_contender_meets_the_target_and_is_timed(rows: list[Row]) -> None:
    assert len(rows) == 2 * (len(adjoints.CONTENDERS) + 1)
    for row in rows:
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["products"] >= 1
        if row["contender"] == times.FLOOR:
            assert row["reached"] is None
        else:
            assert row["reached"]
            assert row["residual"] <= row["target"]


def test_products_are_counted_exactly(rows: list[Row]) -> None:
    problem = contenders.at_solution(tiny())
    z = problem.z0.clone().requires_grad_()
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = problem.f(z)
    u, product, needed = g, torch.zeros_like(g), 0
    while True:  # Picard by hand, from g; the residual of every iterate costs one product
        (product,) = torch.autograd.grad(image, z, u, retain_graph=True)
        needed += 1
        if adjoints.adjoint_residual(problem, u, g) <= 1e-5:
            break
        u = product + g
    found = by_name(rows, 1e-5)
    assert found["deqlib Picard"]["products"] == needed
    # From zero it takes one more, and the image of the last one is what it returns: that is not measured.
    assert found["torchdeq Picard"]["products"] == needed
    assert found[times.FLOOR]["products"] == found[adjoints.OURS]["products"]


def test_the_adjoint_is_caught_where_it_enters_the_cells_graph() -> None:
    problem = contenders.at_solution(tiny())
    g = torch.randn(problem.z0.shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: problem.f(z.view_as(problem.z0)).flatten(), problem.z0.flatten()
    )
    u = torch.linalg.solve(torch.eye(len(jacobian), dtype=torch.float64) - jacobian.T, g.flatten())
    for name, contender in adjoints.CONTENDERS.items():
        counted = CountedCell(problem.cell)
        contender(replace(problem, cell=counted), 1e-11, 100).backward(g)
        assert counted.gradient is not None, name
        torch.testing.assert_close(counted.gradient.flatten(), u, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", adjoints.CONTENDERS)
def test_what_is_caught_is_what_the_inputs_gradients_are_made_of(name: str) -> None:
    problem = contenders.at_solution(tiny())
    g = torch.randn(problem.z0.shape, dtype=torch.float64)
    counted = CountedCell(problem.cell)
    adjoints.CONTENDERS[name](replace(problem, cell=counted), 1e-2, 100).backward(
        g
    )  # far from the exact adjoint
    assert counted.gradient is not None
    (expected,) = torch.autograd.grad(problem.f(problem.z0), problem.inputs[1], counted.gradient)
    torch.testing.assert_close(problem.inputs[1].grad, expected, rtol=1e-12, atol=1e-12)


def test_the_residual_of_a_wrong_adjoint_is_seen() -> None:
    problem = contenders.at_solution(linear([0.5, 0.5], batch=2, dtype=torch.float64))
    g = torch.ones(2, 2, dtype=torch.float64)
    assert adjoints.adjoint_residual(problem, 2 * g, g) == pytest.approx(0, abs=1e-12)
    assert adjoints.adjoint_residual(problem, g, g) == pytest.approx(0.5)
    one_sample_off = torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    assert adjoints.adjoint_residual(problem, one_sample_off, g) == pytest.approx(0.5)


def test_the_tolerance_is_the_loosest_that_meets_the_target(rows: list[Row]) -> None:
    problem = contenders.at_solution(tiny())
    g = contenders.cotangent(problem)
    row = by_name(rows, 1e-2)["torchdeq Picard"]
    assert row["rtol"] > 1e-2  # it returns the image of the iterate that it judges by
    counted = CountedCell(problem.cell)
    contender = adjoints.CONTENDERS[row["contender"]]
    contender(replace(problem, cell=counted), row["rtol"] * math.sqrt(2), adjoints.BUDGET).backward(g)
    assert counted.gradient is not None
    assert adjoints.adjoint_residual(problem, counted.gradient, g) > 1e-2


def test_a_contender_that_raises_or_never_arrives_loses_its_case_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError("no")

    def jfb(problem: Problem, *_: Any) -> Tensor:
        value: Tensor = fixed_point(
            problem.f, problem.z0, solver=Picard(), stopping=Stopping.steps(0), backward=JFB()
        ).value
        return value

    monkeypatch.setitem(adjoints.CONTENDERS, "deqlib Broyden", broken)
    monkeypatch.setitem(adjoints.CONTENDERS, "torchdeq Broyden", jfb)
    point = {"problem": "tiny", "target": 1e-3}
    rows = measured(times.CASE, point)
    found = by_name(rows, 1e-3)
    assert found["deqlib Broyden"]["error"] == "ZeroDivisionError: no"
    assert found["deqlib Broyden"]["seconds"] == []
    assert not found["deqlib Broyden"]["reached"]
    assert not found["torchdeq Broyden"]["reached"]
    assert found[adjoints.OURS]["reached"]
    raises, *_, broyden = times.bars(rows)
    assert raises.value == 1
    assert "ZeroDivisionError" in raises.note
    assert broyden.verdict == "not measured"
    table = times.table(rows)
    cells = dict(zip(table.head, table.lines[0], strict=True))
    assert cells["deqlib Broyden"] == "raised"
    assert cells["torchdeq Broyden"].startswith("(")
    assert not cells["deqlib default"].startswith("(")
    monkeypatch.setitem(adjoints.CONTENDERS, adjoints.OURS, broken)  # then there is no floor to measure
    assert by_name(measured(times.CASE, point), 1e-3)[times.FLOOR]["products"] is None


def test_a_contender_that_hides_its_adjoint_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_the_tape(problem: Problem, *_: Any) -> Tensor:
        return problem.z0.clone().requires_grad_()

    monkeypatch.setitem(adjoints.CONTENDERS, adjoints.OURS, off_the_tape)
    with pytest.raises(RuntimeError, match=f"{adjoints.OURS}: no gradient reached"):
        list(times.build(RUN, problem="tiny", target=1e-2))


def made_up(problem: str, contender: str, seconds: float, reached: bool = True) -> Row:
    return {
        "problem": problem,
        "target": 1e-3,
        "contender": contender,
        "rtol": 1e-3,
        "products": 10,
        "residual": 1e-4,
        "reached": reached,
        "seconds": [seconds, 2 * seconds],
        "error": None,
    }


def test_bars_compare_with_the_default_the_fastest_that_arrives_and_the_same_solver() -> None:
    rows = [
        made_up("a", adjoints.OURS, 1.0),
        made_up("a", "deqlib Anderson", 0.5),
        made_up("a", times.THEIR_DEFAULT, 4.0),
        made_up("a", "torchdeq Anderson", 2.0),
        made_up("a", "torchdeq Broyden", 0.1, reached=False),
        made_up("b", adjoints.OURS, 1.0),
        made_up("b", "deqlib Anderson", 2.0, reached=False),
        made_up("b", times.THEIR_DEFAULT, 1.0, reached=False),
        made_up("b", "torchdeq Anderson", 8.0),
        made_up("c", adjoints.OURS, 9.0, reached=False),
        made_up("c", times.THEIR_DEFAULT, 1.0, reached=False),
        made_up("c", "torchdeq Anderson", 1.0, reached=False),
    ]
    raises, misses, both, bound, worst, fastest, picard, anderson, broyden = times.bars(rows)
    assert raises.value == misses.value == 0
    assert both.value == pytest.approx(0.25)
    assert bound.value == pytest.approx(0.5)  # 1/4 and at most 1/1
    assert "b, 1e-03: 1.00 (bound)" in bound.note
    assert "c, 1e-03" not in bound.note
    assert worst.value == pytest.approx(0.25)  # "b" has no other to be compared with
    assert worst.note == "a, 1e-03"
    assert fastest.value == pytest.approx(0.25)  # 1/2 and 1/8
    assert anderson.value == pytest.approx(0.25)
    assert {bar.verdict for bar in (both, bound, worst, fastest, anderson)} == {"pass"}
    assert [bar.limit for bar in (both, bound, worst, fastest, anderson)] == [0.8, 0.8, 1.05, 0.6, 0.6]
    assert {bar.verdict for bar in (picard, broyden)} == {"not measured"}

    def changed(**columns: Any) -> list[Row]:
        return [{**row, **(columns if row["contender"] == adjoints.OURS else {})} for row in rows]

    slower = times.bars(changed(seconds=[5.0, 10.0]))
    assert {slower[2].verdict, slower[4].verdict} == {"FAIL"}
    assert slower[4].value == pytest.approx(1.25)
    lost = times.bars(changed(reached=False))
    assert lost[1].value == 2  # "c" torchdeq misses as well
    assert lost[2].verdict == "not measured"


def test_the_table_has_products_and_milliseconds() -> None:
    rows = [made_up("a", adjoints.OURS, 0.2), made_up("a", "torchdeq Anderson", 2.0, reached=False)]
    table = times.table(rows)
    cells = dict(zip(table.head, table.lines[0], strict=True))
    assert table.lines[0][0] == "a, 1e-03"
    assert cells[adjoints.OURS] == "10 / 300 ± 50"
    assert cells["torchdeq Anderson"] == "(10 / 3,000 ± 500)"
    assert cells["deqlib GMRES"] == "-"


def test_the_cells_take_10_to_60_products(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: adjoints.CONTENDERS[name] for name in (adjoints.OURS, "deqlib Picard")}
    monkeypatch.setattr(times, "CONTENDERS", only)
    for row in times.build(replace(RUN, rounds=0), problem="MLP 32x1x256", target=1e-6):
        if row["contender"] == "deqlib Picard":
            assert 10 <= row["products"] <= 60
            assert row["reached"]
            assert row["seconds"] == []


# Profiles -----------------------------------------------------------------------------------------------


def test_a_marked_cell_has_the_same_gradients_and_marks_every_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(function)
            return function(*args)

        return call

    monkeypatch.setattr(marks, "marked", counting)
    problem = contenders.at_solution(tiny())
    cell = marks.marked_both_ways(problem.cell)
    z = problem.z0.clone().requires_grad_()
    g = contenders.cotangent(problem)
    image = cell(z, *problem.inputs)
    torch.testing.assert_close(image, problem.f(z), rtol=0, atol=0)
    (product,) = torch.autograd.grad(image, z, g, retain_graph=True)
    assert len(calls) == 2  # the evaluation, and one product that leaves the inputs alone
    found = (product, *torch.autograd.grad(image, problem.inputs, g))
    assert len(calls) == 3
    expected = torch.autograd.grad(problem.f(z), (z, *problem.inputs), g)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not cell(z, *problem.inputs).requires_grad
    assert len(calls) == 4


@pytest.mark.parametrize("case", [times.CASE, modes.CASE], ids=lambda case: case.name)
def test_a_profile_tells_the_cell_from_the_rest(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluations = 0

    def counted(**settings: Any) -> Problem:
        problem = tiny(**settings)

        def cell(*args: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return problem.cell(*args)

        return replace(problem, cell=cell)

    for module in (times, modes):
        monkeypatch.setitem(module.PROBLEMS, "tiny", counted)
    assert case.solve is not None
    table = profiled(case.solve(RUN, **POINTS[case.name][0]), tmp_path / "trace.json")  # runs it twice
    calls = {line[0]: line[1] for line in table.lines}
    assert int(calls["the cell"]) > evaluations / 2 + 2  # products as well


# Modes --------------------------------------------------------------------------------------------------


def test_the_exact_gradient_is_that_of_dense_linear_algebra() -> None:
    problem = tiny(batch=1)
    g = contenders.cotangent(problem)
    assert problem.solution is not None
    jacobian = torch.autograd.functional.jacobian(
        lambda z: problem.f(z.view_as(problem.z0)).flatten(), problem.solution.flatten()
    )
    u = torch.linalg.solve(torch.eye(len(jacobian), dtype=torch.float64) - jacobian.T, g.flatten())
    subject = contenders.at_solution(problem)
    parts = torch.autograd.grad(subject.f(problem.solution), subject.inputs, u.view_as(g))
    expected = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(modes.exact_gradient(problem, g), expected, rtol=1e-9, atol=1e-9)


def test_an_adjoint_whose_series_diverges_is_an_error() -> None:
    problem = expanding(batch=1, width=4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expanding: the series"):
        modes.exact_gradient(problem, torch.ones_like(problem.z0))


def test_modes_differ_in_error_as_they_should(mode_rows: dict[str, Row]) -> None:
    error = {name: row["gradient_error"] for name, row in mode_rows.items()}
    assert set(error) == set(modes.MODES)
    exact = ["ImplicitDifferentiation", "ImplicitDifferentiation, Picard", "Unroll", "Unroll, checkpoint"]
    for name in (*exact, "Reversible", "torchdeq ift", "torchdeq hook_ift"):
        assert 0 < error[name] < 1e-3, name
    assert error["JFB"] > 2 * error["PhantomGradient, 5 steps"] > 0.01
    assert error["SharedInverse, 5 refining steps"] < error["SharedInverse"]
    # The same methods in both libraries: torchdeq ends its solve one image later.
    for ours, theirs in (("JFB", "grad=1"), ("PhantomGradient, 5 steps", "grad=5, tau=0.5")):
        assert error[f"torchdeq {theirs}"] == pytest.approx(error[ours], rel=1e-3)
    assert error["PhantomGradient, Neumann"] == pytest.approx(error["PhantomGradient, 5 steps"], rel=1e-3)


def test_modes_differ_in_memory_as_they_should(mode_rows: dict[str, Row]) -> None:
    saved = {name: row["saved_bytes"] for name, row in mode_rows.items()}
    assert saved["torchdeq grad=1"] == saved["JFB"]
    assert saved["torchdeq grad=5, tau=0.5"] == saved["PhantomGradient, 5 steps"] > 4 * saved["JFB"]
    assert saved["Unroll"] > saved["Unroll, checkpoint"] > saved["ImplicitDifferentiation"]
    for row in mode_rows.values():
        assert row["peak_bytes"] > row["saved_bytes"] > 0
        assert len(row["seconds"]) == RUN.rounds
    assert (
        saved["SharedInverse"] == saved["SharedInverse, 5 refining steps"] > 5 * saved["JFB"]
    )  # the history


def test_a_gradient_that_is_not_finite_has_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(problem: Problem) -> Tensor:
        return problem.f(problem.z0) * math.nan

    monkeypatch.setattr(modes, "MODES", {"broken": broken, "JFB": modes.MODES["JFB"]})
    rows = measured(modes.CASE, {"problem": "tiny", "batch": 1})
    assert [row["gradient_error"] is None for row in rows] == [True, False]
    assert modes.table(rows).lines[0][1].startswith("- / ")
    draw(modes.CASE, rows, tmp_path / "picture.png")


# Accuracy -----------------------------------------------------------------------------------------------


def test_gradients_are_accurate_on_random_problems() -> None:
    rows = figures("accuracy")
    bars = accuracy.bars(rows)
    assert len(bars) == len(accuracy.EXACT) + len(random_maps.CHEAP)
    assert {bar.verdict for bar in bars} == {"pass"}
    assert {bar.limit for bar in bars} == {1e-6, 1e-10}
    assert all(row["worst_error"] > 0 for row in rows)
    for bar in bars:
        name = bar.name.partition(":")[0]
        chunks = [row["worst_error"] for row in rows if row["contender"] == name]
        assert len(chunks) == 2
        assert bar.value == max(chunks)
        assert bar.name.endswith("worst of 4")


def test_chunks_are_what_the_whole_is() -> None:
    whole = measured(accuracy.CASE, {"first_seed": 5, "count": 2})
    parts = measured(accuracy.CASE, *({"first_seed": seed, "count": 1} for seed in (5, 6)))
    for bar, other in zip(accuracy.bars(whole), accuracy.bars(parts), strict=True):
        assert bar == other
    seeds = [
        seed
        for point in accuracy.CASE.grid
        for seed in range(point["first_seed"], point["first_seed"] + point["count"])
    ]
    assert seeds == list(range(300))


def test_the_reference_is_the_gradient_of_the_fixed_point_map() -> None:
    for seed in range(12):
        problem = random_maps.draw(seed)
        torch.testing.assert_close(problem.f(problem.solution), problem.solution, rtol=1e-12, atol=1e-12)
        assert torch.equal(problem.joined(problem.cut(problem.solution)), problem.solution)
        z = problem.solution.detach()
        for _ in range(400):  # a bare loop on the tape: no deqlib and no Jacobian
            z = problem.f(z)
        parts = torch.autograd.grad(z, problem.leaves, problem.g)
        unrolled = torch.cat([part.flatten() for part in parts])
        assert random_maps.relative_error(random_maps.reference(problem, random_maps.exact), unrolled) < 1e-9


def test_problems_have_the_norm_and_the_radius_that_they_should() -> None:
    def jacobian(problem: random_maps.RandomMap) -> Tensor:
        flat = problem.solution.flatten()
        found: Tensor = torch.autograd.functional.jacobian(
            lambda v: problem.f(v.view_as(problem.solution)).flatten(), flat
        )
        return found.detach()

    for seed in range(6):
        assert float(torch.linalg.matrix_norm(jacobian(random_maps.draw(seed)), 2)) <= 0.9 + 1e-9
        radius = torch.linalg.eigvals(jacobian(random_maps.draw(seed, 0.95))).abs().max()
        assert float(radius) == pytest.approx(0.95)
    names = " ".join(random_maps.draw(seed).name for seed in range(40))
    assert all(kind in names for kind in (*random_maps.KINDS, "pytree"))
    assert {random_maps.draw(seed).solution.shape[0] for seed in range(40)} == {1, 2, 3, 4}


def test_an_inexact_mode_breaks_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-2))
    monkeypatch.setattr(accuracy, "EXACT", {"loose": loose, "unrolled": Unroll()})
    wrong = random_maps.Series(JFB(), 2, 1.0)
    monkeypatch.setattr(accuracy, "CHEAP", {"wrong": wrong, "JFB": random_maps.CHEAP["JFB"]})
    rows = measured(accuracy.CASE, {"first_seed": 0, "count": 3})
    verdicts = {bar.name.partition(":")[0]: bar.verdict for bar in accuracy.bars(rows)}
    assert verdicts == {"loose": "FAIL", "unrolled": "pass", "wrong": "FAIL", "JFB": "pass"}
    assert random_maps.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_a_gradient_that_is_not_a_number_breaks_the_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accuracy, "relative_error", lambda found, expected: math.inf)
    rows = measured(accuracy.CASE, {"first_seed": 0, "count": 1})
    assert all(row["worst_error"] is None for row in rows)
    assert {bar.verdict for bar in accuracy.bars(rows)} == {"FAIL"}
    accuracy.table(rows)
    draw(accuracy.CASE, rows, tmp_path / "picture.png")


# Cosine -------------------------------------------------------------------------------------------------


def test_cheap_gradients_point_the_less_to_the_exact_one_the_larger_the_radius() -> None:
    radii = [0.3, 0.8, 0.95]
    rows = measured(cosine.CASE, *({"radius": radius, "count": 6} for radius in radii))
    assert all(-1 <= row["least"] <= row["median"] <= 1 + 1e-12 for row in rows)
    for name in dict.fromkeys(row["contender"] for row in rows):
        medians = [row["median"] for row in rows if row["contender"] == name]
        assert medians == sorted(medians, reverse=True)
    at_most = {row["contender"]: row for row in rows if row["radius"] == 0.95}
    assert at_most["JFB"]["median"] < at_most["PhantomGradient, 10 steps, damping 0.8"]["median"]
    problem = random_maps.draw(0, 0.95)
    # Of one problem, median and least are its cosine; that of JFB by hand, u = g.
    (row,) = (row for row in measured(cosine.CASE, {"radius": 0.95, "count": 1}) if row["contender"] == "JFB")
    cheap = torch.autograd.grad(problem.f(problem.solution), problem.leaves, problem.g)
    flat = torch.cat([part.flatten() for part in cheap])
    right = random_maps.reference(problem, random_maps.exact)
    expected = float(flat @ right / flat.norm() / right.norm())
    assert row["median"] == row["least"] == pytest.approx(expected, abs=1e-9)


# Memory -------------------------------------------------------------------------------------------------


def test_saved_bytes_grow_with_the_steps_of_unrolling_alone() -> None:
    rows = measured(memory.CASE, *({"batch": 2, "width": 8, "steps": n} for n in (1, 10, 200)))
    bars = memory.bars(rows)
    assert len(bars) == len(memory.CONSTANT) == 6
    assert {bar.verdict for bar in bars} == {"pass"}
    assert {bar.limit for bar in bars} == {1.0}
    assert "200 / 1 steps" in bars[0].name
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["contender"], []).append(row["saved_bytes"])
    for name in memory.GROWING:
        one, ten, many = sizes.pop(name)
        assert (ten, many) == (10 * one, 200 * one)
    for name in memory.BOUNDED:
        one, ten, many = sizes.pop(name)
        assert one < ten == many
    assert set(sizes) == {*memory.CONSTANT, *memory.THEIRS}
    for values in sizes.values():
        assert len(set(values)) == 1
        assert values[0] > 0


def test_bytes_are_those_of_the_graph_that_lives() -> None:
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def compute() -> Tensor:
        (x * 2).square().sum()  # saves 8 kB for a graph that nobody keeps
        doubled = x * 2
        return (doubled * doubled).exp().sum()  # keeps what is squared, once, and the exponential

    assert saved_bytes(compute) == 16_000
    assert saved_bytes(lambda: (x * x).sum(), exclude=[x]) == 0
    assert saved_bytes(lambda: (x * x).sum()) == 8_000


def test_growing_memory_breaks_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    unrolled = memory.GROWING["Unroll"]
    monkeypatch.setattr(memory, "CONSTANT", {"unrolled": unrolled})
    bars = partial(measured, memory.CASE)
    (bar,) = memory.bars(bars(*({"batch": 2, "width": 8, "steps": n} for n in (2, 20))))
    assert bar.value == pytest.approx(10)
    assert bar.verdict == "FAIL"

    def verdict(*sizes: int) -> str:
        rows = [
            {"contender": "mode", "constant": True, "steps": 10**i, "saved_bytes": size}
            for i, size in enumerate(sizes)
        ]
        (bar,) = memory.bars(rows)
        return bar.verdict

    assert verdict(200, 200) == "pass"
    assert verdict(200, 100) == "FAIL"
    assert verdict(0, 0) == "FAIL"
    assert verdict(200) == "not measured"

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.suites.gradients import accuracy, memory, times
from deqlib import JFB, ImplicitDifferentiation, Picard, Stopping, Unroll, fixed_point
from deqlib.testing import Problem, linear, mlp

TINY = {"batch": 2, "tokens": 3, "width": 8, "gain": 0.7}


def tiny(name: str = "tiny") -> Problem:
    return mlp(**TINY, dtype=torch.float64, name=name)


@pytest.fixture(scope="module")
def rows() -> list[times.Row]:
    return times.measure([tiny()], rounds=2, targets=(1e-2, 1e-5))


def by_name(rows: list[times.Row], target: float) -> dict[str, times.Row]:
    return {row.contender: row for row in rows if row.target == target}


# Time ---------------------------------------------------------------------------------------------------


def test_every_contender_meets_the_target_and_is_timed(rows: list[times.Row]) -> None:
    assert len(rows) == 2 * (len(times.CONTENDERS) + 1)
    for row in rows:
        assert row.error is None
        assert len(row.times) == 2
        assert row.seconds > 0
        if row.contender != times.FLOOR:
            assert row.reached
            assert row.residual is not None
            assert row.residual <= row.target
            assert row.products >= 1


def test_products_are_counted_exactly(rows: list[times.Row]) -> None:
    problem = times.at_solution(tiny())
    z = problem.z0.clone().requires_grad_()
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = problem.f(z)
    u, product, needed = g, torch.zeros_like(g), 0
    while True:  # Picard by hand, from g; the residual of every iterate costs one product
        (product,) = torch.autograd.grad(image, z, u, retain_graph=True)
        needed += 1
        if times.adjoint_residual(problem, u, g) <= 1e-5:
            break
        u = product + g
    found = by_name(rows, 1e-5)
    assert found["deqlib Picard"].products == needed
    # From zero it takes one more, and the image of the last one is what it returns: that is not measured.
    assert found["torchdeq fixed_point_iter"].products == needed
    assert found[times.FLOOR].products == found[times.OURS].products


def test_the_adjoint_is_caught_where_it_enters_the_cells_graph() -> None:
    problem = times.at_solution(tiny())
    g = torch.randn(problem.z0.shape, dtype=torch.float64)
    for name, contender in times.CONTENDERS.items():
        tap = times.Tap(problem.cell)
        contender(replace(problem, cell=tap), 1e-11, 100).backward(g)
        assert tap.last is not None, name
        jacobian = torch.autograd.functional.jacobian(
            lambda z: problem.f(z.view_as(problem.z0)).flatten(), problem.z0.flatten()
        )
        u = torch.linalg.solve(torch.eye(len(jacobian), dtype=torch.float64) - jacobian.T, g.flatten())
        torch.testing.assert_close(tap.last.flatten(), u, rtol=1e-8, atol=1e-8)
        for leaf in problem.inputs:
            leaf.grad = None


@pytest.mark.parametrize("name", times.CONTENDERS)
def test_what_is_caught_is_what_the_inputs_gradients_are_made_of(name: str) -> None:
    problem = times.at_solution(tiny())
    g = torch.randn(problem.z0.shape, dtype=torch.float64)
    tap = times.Tap(problem.cell)
    times.CONTENDERS[name](replace(problem, cell=tap), 1e-2, 100).backward(g)  # far from the exact adjoint
    assert tap.last is not None
    (expected,) = torch.autograd.grad(problem.f(problem.z0), problem.inputs[1], tap.last)
    torch.testing.assert_close(problem.inputs[1].grad, expected, rtol=1e-12, atol=1e-12)


def test_the_residual_of_a_wrong_adjoint_is_seen() -> None:
    problem = times.at_solution(linear([0.5, 0.5], batch=2, dtype=torch.float64))
    g = torch.ones(2, 2, dtype=torch.float64)
    assert times.adjoint_residual(problem, 2 * g, g) == pytest.approx(0, abs=1e-12)
    assert times.adjoint_residual(problem, g, g) == pytest.approx(0.5)
    one_sample_off = torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    assert times.adjoint_residual(problem, one_sample_off, g) == pytest.approx(0.5)


def test_the_tolerance_is_the_loosest_that_meets_the_target(rows: list[times.Row]) -> None:
    problem = times.at_solution(tiny())
    g = torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = by_name(rows, 1e-2)["torchdeq fixed_point_iter"]
    assert row.rtol > 1e-2  # it returns the image of the iterate that it judges by
    tap = times.Tap(problem.cell)
    contender = times.CONTENDERS[row.contender]
    contender(replace(problem, cell=tap), row.rtol * math.sqrt(2), times.BUDGET).backward(g)
    assert tap.last is not None
    assert times.adjoint_residual(problem, tap.last, g) > 1e-2


def test_a_contender_that_raises_or_never_arrives_loses_its_case_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError("no")

    def jfb(problem: Problem, *_: Any) -> Tensor:
        rule = Stopping.steps(0)
        value: Tensor = fixed_point(
            problem.f, problem.z0, solver=Picard(), stopping=rule, backward=JFB()
        ).value
        return value

    monkeypatch.setitem(times.CONTENDERS, "deqlib Broyden", broken)
    monkeypatch.setitem(times.CONTENDERS, "torchdeq broyden", jfb)
    found = {row.contender: row for row in times.measure([tiny()], rounds=1, targets=(1e-3,))}
    assert found["deqlib Broyden"].error == "ZeroDivisionError: no"
    assert found["deqlib Broyden"].times == []
    assert not found["torchdeq broyden"].reached
    assert found[times.OURS].reached
    rows = list(found.values())
    assert times.bars(rows)[0].value == 1
    assert times.ratios(rows)["tiny 1e-03"]["Broyden, deqlib / torchdeq"] is None
    times.table(rows)
    json.dumps(times.record(rows), allow_nan=False)


def test_a_contender_that_hides_its_adjoint_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_the_tape(problem: Problem, *_: Any) -> Tensor:
        return problem.z0.clone().requires_grad_()

    monkeypatch.setitem(times.CONTENDERS, times.OURS, off_the_tape)
    with pytest.raises(RuntimeError, match=f"{times.OURS}: no gradient reached"):
        times.measure([tiny()], rounds=0, targets=(1e-2,))


def made_up(case: str, contender: str, seconds: float, reached: bool = True) -> times.Row:
    return times.Row(case, 1e-3, contender, 1e-3, 10, 1e-4, reached, seconds, [seconds, 2 * seconds])


def test_bars_compare_with_the_default_the_fastest_that_arrives_and_the_same_solver() -> None:
    rows = [
        made_up("a", times.OURS, 1.0),
        made_up("a", "deqlib Anderson", 0.5),
        made_up("a", times.THEIR_DEFAULT, 4.0),
        made_up("a", "torchdeq anderson", 2.0),
        made_up("a", "torchdeq broyden", 0.1, reached=False),
        made_up("b", times.OURS, 1.0),
        made_up("b", "deqlib Anderson", 2.0, reached=False),
        made_up("b", times.THEIR_DEFAULT, 1.0, reached=False),
        made_up("b", "torchdeq anderson", 8.0),
        made_up("c", times.OURS, 9.0, reached=False),
        made_up("c", times.THEIR_DEFAULT, 1.0, reached=False),
        made_up("c", "torchdeq anderson", 1.0, reached=False),
    ]
    raises, misses, both, bound, fastest, picard, anderson, broyden = times.bars(rows)
    assert raises.value == misses.value == 0
    assert both.value == pytest.approx(0.25)
    assert bound.value == pytest.approx(0.5)  # 1/4 and at most 1/1
    assert "b 1e-03: 1.00 (bound)" in bound.note
    assert "c 1e-03" not in bound.note
    assert fastest.value == pytest.approx(0.25)  # 1/2 and 1/8
    assert anderson.value == pytest.approx(0.25)
    assert {bar.verdict for bar in (both, bound, fastest, anderson)} == {"pass"}
    assert {bar.verdict for bar in (picard, broyden)} == {"not measured"}
    slower = [
        replace(row, times=[t * 3 for t in row.times]) if row.contender == times.OURS else row for row in rows
    ]
    assert times.bars(slower)[2].verdict == "FAIL"
    lost = [replace(row, reached=False) if row.contender == times.OURS else row for row in rows]
    assert times.bars(lost)[1].value == 2  # "c" torchdeq misses as well
    assert times.bars(lost)[2].verdict == "not measured"


def test_the_cells_take_10_to_60_products(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {name: times.CONTENDERS[name] for name in (times.OURS, "deqlib Picard")}
    monkeypatch.setattr(times, "CONTENDERS", only)
    (small,) = [problem for problem in times.cases() if problem.name == "MLP 32x1x256"]
    for row in times.measure([small], rounds=0):
        if row.contender == "deqlib Picard":
            assert 10 <= row.products <= 60
            assert row.reached


# Accuracy -----------------------------------------------------------------------------------------------


def test_gradients_are_accurate_on_random_problems() -> None:
    found = accuracy.measure(4, cosine_cases=3)
    bars = accuracy.bars(found)
    assert len(bars) == len(accuracy.EXACT) + len(accuracy.CHEAP)
    assert {bar.verdict for bar in bars} == {"pass"}
    assert all(row["worst"] > 0 for row in found["errors"].values())
    jfb = found["cosines"]["JFB"]
    assert set(jfb) == {"0.5", "0.8", "0.9", "0.95"}
    assert all(-1 <= row["least"] <= row["median"] <= 1 + 1e-12 for row in jfb.values())
    assert jfb["0.5"]["median"] > jfb["0.95"]["median"]
    accuracy.table(found)
    json.dumps(found, allow_nan=False)


def test_the_reference_is_the_gradient_of_the_fixed_point_map() -> None:
    for seed in range(12):
        case = accuracy.draw(seed)
        torch.testing.assert_close(case.f(case.solution), case.solution, rtol=1e-12, atol=1e-12)
        assert torch.equal(case.joined(case.cut(case.solution)), case.solution)
        z = case.solution.detach()
        for _ in range(400):  # a bare loop on the tape: no deqlib and no Jacobian
            z = case.f(z)
        unrolled = torch.cat([d.flatten() for d in torch.autograd.grad(z, case.leaves, case.g)])
        assert accuracy.relative_error(accuracy.reference(case, accuracy.exact), unrolled) < 1e-9


def test_problems_have_the_norm_and_the_radius_that_they_should() -> None:
    def jacobian(case: accuracy.Case) -> Tensor:
        flat = case.solution.flatten()
        found: Tensor = torch.autograd.functional.jacobian(
            lambda v: case.f(v.view_as(case.solution)).flatten(), flat
        )
        return found.detach()

    for seed in range(6):
        assert float(torch.linalg.matrix_norm(jacobian(accuracy.draw(seed)), 2)) <= 0.9 + 1e-9
        radius = torch.linalg.eigvals(jacobian(accuracy.draw(seed, 0.95))).abs().max()
        assert float(radius) == pytest.approx(0.95)
    names = " ".join(accuracy.draw(seed).name for seed in range(40))
    assert all(kind in names for kind in (*accuracy.KINDS, "pytree"))
    assert {accuracy.draw(seed).solution.shape[0] for seed in range(40)} == {1, 2, 3, 4}


def test_an_inexact_mode_breaks_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-2))
    monkeypatch.setattr(accuracy, "EXACT", {"loose": loose, "unrolled": Unroll()})
    wrong = accuracy.Series(JFB(), 2, 1.0)
    monkeypatch.setattr(accuracy, "CHEAP", {"wrong": wrong, "JFB": accuracy.CHEAP["JFB"]})
    monkeypatch.setattr(accuracy, "COSINES", ("JFB",))
    verdicts = {bar.name: bar.verdict for bar in accuracy.bars(accuracy.measure(3, cosine_cases=0))}
    assert [verdict for name, verdict in verdicts.items() if name.startswith("loose")] == ["FAIL"]
    assert [verdict for name, verdict in verdicts.items() if name.startswith("wrong")] == ["FAIL"]
    assert [verdict for name, verdict in verdicts.items() if name.startswith("JFB")] == ["pass"]
    assert accuracy.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert {bar.verdict for bar in accuracy.bars(accuracy.measure(0, 0))} == {"not measured"}


# Memory -------------------------------------------------------------------------------------------------


def test_saved_bytes_do_not_grow_with_the_steps() -> None:
    rows = memory.measure(batch=2, width=8)
    assert set(rows) == set(memory.MODES)
    assert {bar.verdict for bar in memory.bars(rows)} == {"pass"}
    memory.table(rows)


def test_bytes_are_those_of_the_graph_that_lives() -> None:
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def compute() -> Tensor:
        (x * 2).square().sum()  # saves 8 kB for a graph that nobody keeps
        doubled = x * 2
        return (doubled * doubled).exp().sum()  # keeps what is squared, once, and the exponential

    assert memory.saved_bytes(compute) == 16_000
    assert memory.saved_bytes(lambda: (x * x).sum(), exclude=[x]) == 0
    assert memory.saved_bytes(lambda: (x * x).sum()) == 8_000


def test_growing_memory_breaks_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MODES", {"unrolled": (Unroll(), Picard())})
    (bar,) = memory.bars(memory.measure(batch=2, width=8, steps=(2, 20)))
    assert bar.value == pytest.approx(10)
    assert bar.verdict == "FAIL"
    assert memory.bars({"fewer": {10: 200, 1000: 100}})[0].verdict == "FAIL"
    assert memory.bars({"none": {10: 0, 1000: 0}})[0].verdict == "FAIL"


# The command --------------------------------------------------------------------------------------------


def test_the_command_writes_the_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(times, "cases", lambda: [tiny(), tiny("other")])
    monkeypatch.setattr(memory, "measure", partial(memory.measure, batch=1, width=4))
    out = tmp_path / "folder" / "gradients.json"
    monkeypatch.setattr(accuracy, "EXACT", dict(list(accuracy.EXACT.items())[:1]))
    settings = ["--rounds", "1", "--problems", "tiny", "--cases", "1", "--cosine-cases", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gradients", *settings, "--out", str(out)])
    main()
    saved = json.loads(out.read_text())
    assert saved["machine"]["torch"] == torch.__version__
    assert {row["problem"] for row in saved["parts"]["time"]["rows"]} == {"tiny"}
    assert set(saved["parts"]) == {"time", "accuracy", "memory"}
    assert saved["parts"]["accuracy"]["cases"] == 1
    assert all(bar["verdict"] for bar in saved["bars"])


def test_an_unknown_problem_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gradients", "--problems", "nothing"])
    with pytest.raises(SystemExit, match="nothing"):
        main()

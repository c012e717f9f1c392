"""Methods in turn: who works on which sample, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import problem
from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver, Status, Stopping, fixed_point
from deqlib.driver import iterate
from deqlib.testing import expanding, monotone, suite, tanh_rnn


@dataclass(frozen=True, kw_only=True)
class Steps(Solver):
    """Goes up by `size` a step."""

    size: float

    def init(self, z0: Tensor) -> int:
        return 0

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        return z + self.size, state + 1


def valley(z: Tensor) -> Tensor:
    """A map whose residual at z is |z - bottom|, the bottom at 5, 15 and 100 for three samples."""
    bottom = torch.tensor([[5.0], [15.0], [100.0]], dtype=z.dtype)
    return z + (z - bottom).abs()


def walk(auto: Auto, **stopping: Any) -> Any:
    settings = {"rtol": 0, "atol": 0.5, "max_steps": 60, "patience": None, **stopping}
    z0 = torch.zeros(3, 1, dtype=torch.float64)
    return iterate(valley, z0, auto, Stopping(**settings))


def test_a_sample_is_handed_on_after_its_patience_and_starts_at_its_best() -> None:
    # The first method goes the wrong way: the best is the start. The second goes right, in ones.
    solution = walk(Auto(methods=(Steps(size=-1.0), Steps(size=1.0)), patience=4, rounds=1))
    # Given up at step 4, evaluated anew at its best at step 5, the bottom 5 and 15 steps later.
    assert solution.num_steps.tolist() == [10, 20, 60]
    assert [Status(code).name for code in solution.status.tolist()] == ["CONVERGED", "CONVERGED", "MAX_STEPS"]
    assert solution.value.flatten().tolist() == [5, 15, 55]
    assert solution.method.tolist() == [1, 1, 1]
    assert solution.methods == ("Steps", "Steps")
    assert solution.nfe == 61


def test_samples_change_hands_one_by_one_and_the_others_do_not_notice() -> None:
    # Steps of 4 pass 5 by (residuals 5, 1, 3): the first sample is given up, the others go on.
    auto = Auto(methods=(Steps(size=4.0), Steps(size=1.0)), patience=2, rounds=1)
    solution = walk(auto, atol=0.9, max_steps=30)
    # Best 4 at step 1, given up at step 3, there again at step 4, at 5 at step 5.
    assert solution.value.flatten().tolist()[0] == 5
    assert solution.num_steps.tolist()[0] == 5
    assert solution.method.tolist() == [1, 1, 0]
    alone = iterate(
        lambda z: z + (z - 100).abs(),
        torch.zeros(1, 1, dtype=torch.float64),
        auto,
        Stopping(rtol=0, atol=0.9, max_steps=30, patience=None),
    )
    assert alone.num_steps[0] == solution.num_steps[2] == 25
    assert torch.equal(alone.value[0], solution.value[2])


def test_after_the_last_method_the_first_has_another_go_if_rounds_allow() -> None:
    for rounds, stages in ((1, 1), (3, 5)):
        auto = Auto(methods=(Steps(size=-1.0), Steps(size=-2.0)), patience=3, rounds=rounds)
        solution = walk(auto, patience=3)
        assert solution.method.tolist() == [stages] * 3
        assert solution.methods == ("Steps", "Steps") * rounds
        assert [Status(code).name for code in solution.status.tolist()] == ["STALLED"] * 3


@pytest.mark.parametrize("index", [0, 3, 5])
def test_what_anderson_solves_auto_solves_with_the_same_evaluations_and_bits(index: int) -> None:
    base = suite()[index]
    stopping = Stopping(rtol=1e-5, max_steps=100)
    with torch.no_grad():
        anderson, auto = (
            fixed_point(base.cell, base.z0, base.inputs, solver=s, stopping=stopping, on_failure="raise")
            for s in (Anderson(), Auto())
        )
    assert anderson.nfe == auto.nfe
    assert torch.equal(anderson.value, auto.value)
    assert auto.method_counts() == {"Anderson": len(base.z0)}


def test_each_sample_is_finished_by_the_first_method_that_can() -> None:
    easy, hard = tanh_rnn(width=16, rate=0.5), expanding(width=16)

    def cell(z: Tensor) -> Tensor:
        return torch.cat([easy.f(z[:4]), hard.f(z[4:])])

    z0 = torch.cat([easy.z0, hard.z0])
    auto = Auto(methods=(Picard(), Broyden()), patience=5)
    with torch.no_grad():
        solution = fixed_point(cell, z0, solver=auto, stopping=Stopping(rtol=1e-4), on_failure="raise")
    assert solution.method_counts() == {"Picard": 4, "Broyden": 4}
    torch.testing.assert_close(
        solution.value, torch.cat([easy.solution, hard.solution]), rtol=1e-2, atol=1e-2
    )
    assert "by Picard 4, Broyden 4" in repr(solution)


def test_a_problem_that_stalls_anderson_is_solved_by_those_after_it() -> None:
    base = monotone(batch=8, width=128)
    stopping = Stopping(rtol=1e-4, max_steps=400, patience=60)
    with torch.no_grad():
        solve = lambda s: fixed_point(  # noqa: E731
            base.cell, base.z0, base.inputs, solver=s, stopping=stopping, on_failure="ignore"
        )
        assert not solve(Anderson(memory=2)).converged.any()
        auto = solve(Auto(methods=(Anderson(memory=2), Broyden(memory=100), NewtonKrylov(memory=40))))
    assert auto.converged.all()
    assert "Anderson" not in auto.method_counts()


def test_samples_that_are_not_finite_from_the_start_are_not_handed_on() -> None:
    base = problem(batch=3)
    solution = fixed_point(
        lambda z: torch.where(torch.arange(3).unsqueeze(1) == 1, torch.nan, base.f(z)),
        base.z0,
        solver=Auto(),
        stopping=Stopping(rtol=1e-8),
        on_failure="ignore",
    )
    assert solution.method.tolist() == [0, 0, 0]
    assert solution.converged.tolist() == [True, False, True]


def test_a_problem_without_solution_is_given_up_in_the_end() -> None:
    def cell(z: Tensor) -> Tensor:  # jumps over the diagonal
        return torch.where(z > 0, -1.0, 1.0)

    solution = fixed_point(cell, torch.zeros(4, 3), stopping=Stopping(max_steps=1000), on_failure="ignore")
    assert (solution.status == Status.STALLED).all()
    assert solution.nfe < 300
    assert solution.value.isfinite().all()


def test_a_sample_that_overflowed_goes_on_from_its_best_with_a_clean_history() -> None:
    def cell(z: Tensor) -> Tensor:  # plain iteration from 0 runs into infinity; a fixed point is at 0.25
        return torch.where(z.abs() > 2, torch.inf, 1 - 3 * z)

    auto = Auto(methods=(Picard(), Anderson(), Broyden()), patience=5)
    start = Anderson(growth=float("inf"))
    for solver in (auto, Auto(methods=(start, Broyden()), patience=5)):
        solution = fixed_point(
            cell,
            torch.tensor([[0.0], [0.2]]),
            solver=solver,
            stopping=Stopping(rtol=1e-4),
            on_failure="raise",
        )
        torch.testing.assert_close(solution.value, torch.full((2, 1), 0.25), rtol=1e-2, atol=0)

    history = start.init(torch.zeros(2, 1))
    z = torch.zeros(2, 1)
    for bad in (1.0, 2.0, torch.nan, 3.0):
        z, history = start.step(z, torch.tensor([[1.0], [bad]]), history)
    adopted = Broyden().adopt(history, torch.zeros(2, 1))
    assert adopted.df[:, : adopted.count].isfinite().all()
    assert (adopted.born[0] >= 0).any()


def test_a_fixed_number_of_steps_is_the_first_methods() -> None:
    base = problem()
    auto = iterate(base.f, base.z0, Auto(), Stopping.steps(7))
    assert torch.equal(auto.value, iterate(base.f, base.z0, Anderson(), Stopping.steps(7)).value)
    assert auto.method.tolist() == [0] * 3


def test_rejections_of_all_methods_are_added_up() -> None:
    def cell(z: Tensor) -> Tensor:  # extrapolation from small z lands where the map throws it far away
        return torch.where(z.abs() > 1.5, 50 * z.abs() + 1, 0.9 * z + 0.2)

    solver = Anderson(growth=2.0)
    one = iterate(cell, torch.zeros(2, 1), solver, Stopping(rtol=1e-6, max_steps=8, patience=None))
    many = iterate(
        cell,
        torch.zeros(2, 1),
        Auto(methods=(solver, solver), patience=3, rounds=3),
        Stopping(rtol=1e-6, max_steps=60, patience=None),
    )
    assert (one.rejections["growth"] >= 1).all()
    assert (many.rejections["growth"] > one.rejections["growth"]).all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Auto(methods=()), TypeError, "at least one solver"),
        (lambda: Auto(methods=[Picard()]), TypeError, "must be a tuple"),
        (lambda: Auto(methods=(Picard(), "Broyden")), TypeError, r"methods\[1\] must be a single method"),
        (lambda: Auto(methods=(Auto(),)), TypeError, r"methods\[0\] must be a single method"),
        (lambda: Auto(patience=0), ValueError, "patience must be at least 1"),
        (lambda: Auto(rounds=0), ValueError, "rounds must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()

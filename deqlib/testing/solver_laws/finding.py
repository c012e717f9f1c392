# ruff: noqa: D102  # the name of a test says what it is about
"""What a solver finds, and what it says of a problem that it cannot solve."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ...counting import CountedCell
from ...fixed_point import fixed_point
from ...solution import Status
from ...stopping import Stopping
from ..problems import Problem
from ..strategies import contractions
from .base import (
    HARD,
    SOLVABLE,
    SolverLaws,
    both_dtypes,
    check_no_worse,
    check_residual,
    normal,
    random_data,
)


class FindingLaws(SolverLaws):
    """What a solver finds, and what it says of a problem that it cannot solve."""

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [(name, torch.float32) for name in SOLVABLE]
        + [(name, torch.float64) for name in ("linear", "tanh", "mlp")],
    )
    def test_known_fixed_points_are_reached_at_the_tolerance_asked(
        self, name: str, dtype: torch.dtype
    ) -> None:
        self._check_solved(SOLVABLE[name](self.contraction, dtype))

    @random_data
    @given(data=st.data())
    def test_random_contractions_are_solved(self, data: Any) -> None:
        self._check_solved(data.draw(contractions(max_rate=self.contraction)))

    def _check_solved(self, problem: Problem) -> None:
        dtype = problem.z0.dtype
        rtol, eps = self.rtol[dtype], torch.finfo(dtype).eps
        found = self._solve(problem)
        assert found.converged.all(), (
            f"{problem.name}: all samples should converge to rtol={rtol:g} within {self.max_steps} steps, "
            f"got {found}; {self._knobs('max_steps', 'contraction', 'rtol')}"
        )
        check_residual(problem, found)
        assert found.relative_residual is not None
        assert (found.relative_residual <= rtol).all(), (
            f"{problem.name}: relative residuals {found.relative_residual.tolist()} exceed rtol={rtol}"
        )
        assert problem.solution is not None
        error = (found.value - problem.solution).flatten(1).norm(dim=1)
        allowed = 50 * (rtol + eps) / (1 - self.contraction) * problem.solution.flatten(1).norm(dim=1)
        assert (error <= allowed).all(), (
            f"{problem.name}: errors {error.tolist()} are too large, allowed {allowed.tolist()}"
        )

    @both_dtypes
    @pytest.mark.parametrize("name", HARD)
    def test_a_problem_it_cannot_solve_ends_with_a_status_and_a_finite_value_no_worse_than_the_start(
        self, name: str, dtype: torch.dtype
    ) -> None:
        problem = HARD[name](dtype)
        found = self._solve(problem, rtol=self.rtol[dtype], max_steps=40, patience=25)
        assert found.value.isfinite().all(), f"{name}: the best iterate should be finite, got {found.value}"
        statuses = {Status(code) for code in found.status.tolist()}
        assert Status.COMPLETED not in statuses, f"{name}: COMPLETED is for a fixed number of steps"
        check_no_worse(problem, found)
        if problem.solution is None:
            assert Status.CONVERGED not in statuses, f"{name} has no fixed point, got {found}"

    @pytest.mark.parametrize("max_steps", [1, 2])
    def test_a_few_steps_give_a_result_no_worse_than_the_start_and_are_counted_exactly(
        self, max_steps: int
    ) -> None:
        for make in SOLVABLE.values():
            problem = make(self.contraction, torch.float32)
            cell = CountedCell(problem.cell)
            counted = dataclasses.replace(problem, cell=cell)
            found = self._solve(counted, rtol=0.0, max_steps=max_steps)
            assert found.nfe == cell.evaluations == max_steps + 1, (
                f"{problem.name}: {max_steps} steps should take {max_steps + 1} evaluations, "
                f"reported {found.nfe}, counted {cell.evaluations}"
            )
            assert found.num_steps.tolist() == [max_steps] * len(problem.z0)
            check_residual(problem, found)
            check_no_worse(problem, found)

    @both_dtypes
    def test_a_constant_map_is_solved(self, dtype: torch.dtype) -> None:
        target = normal(4, 5, dtype=dtype)
        problem = Problem("constant", lambda z: target + 0 * z, torch.zeros_like(target), (), target)
        found = self._solve(problem)
        assert found.converged.all(), (
            f"f(z) = c should be solved, got {found}; {self._knobs('max_steps', 'rtol')}"
        )

    @pytest.mark.parametrize("batch", [0, 1])
    @pytest.mark.parametrize("rule", ["to a tolerance", "fixed steps", "fixed steps, measured"])
    def test_a_batch_of_no_or_one_sample_is_solved(self, rule: str, batch: int) -> None:
        x, rate = normal(batch, 5), 0.5 * self.contraction
        stopping = Stopping.steps(4, measure=rule == "fixed steps, measured")
        if rule == "to a tolerance":
            stopping = Stopping(rtol=self.rtol[torch.float64], max_steps=self.max_steps, patience=None)
        with torch.no_grad():
            found = fixed_point(
                lambda z: rate * z + x,
                torch.zeros_like(x),
                solver=self.solver,
                stopping=stopping,
                on_failure="ignore",
            )
        assert found.value.shape == x.shape
        assert found.status.shape == (batch,)
        if not stopping.is_fixed:
            assert found.converged.all(), (
                f"f(z) = {rate:g} z + x should be solved, got {found}; "
                f"{self._knobs('max_steps', 'contraction', 'rtol')}"
            )

    def test_half_precision_states_stay_finite_and_end_with_a_status(self) -> None:
        for name in ("linear", "mlp"):
            problem = SOLVABLE[name](self.contraction, torch.bfloat16)
            found = self._solve(problem, rtol=1e-4, max_steps=60, patience=25)  # beyond bfloat16
            assert found.value.dtype == torch.bfloat16
            assert found.value.isfinite().all(), f"{name}: the value should be finite, got {found}"
            assert found.relative_residual is not None
            assert (found.relative_residual < 0.5).all(), (
                f"{name}: should come nearer in 60 steps, got {found}; {self._knobs('contraction')}"
            )

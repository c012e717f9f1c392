# ruff: noqa: D102  # the name of a test says what it is about
"""Steps that have nothing left to learn, or from which nothing can be learnt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ...driver import iterate
from ...stopping import Stopping
from .base import SOLVABLE, SolverLaws, both_dtypes, normal


class HistoryLaws(SolverLaws):
    """Steps that have nothing left to learn, or from which nothing can be learnt."""

    @both_dtypes
    def test_a_sample_at_its_fixed_point_stays_there(self, dtype: torch.dtype) -> None:
        centre = torch.arange(12, dtype=dtype).view(3, 4) / 4

        def f(z: Tensor) -> Tensor:  # exact at its fixed point
            return centre + (z - centre) / 2

        with torch.no_grad():
            solved = iterate(f, centre, self.solver, Stopping())
            assert solved.num_steps.tolist() == [0, 0, 0]
            assert torch.equal(solved.value, centre)
            moved = iterate(f, centre, self.solver, Stopping.steps(30)).value
        torch.testing.assert_close(
            moved, centre, msg=lambda text: f"30 steps should not leave a fixed point: {text}"
        )

    @both_dtypes
    def test_steps_beyond_convergence_stay_at_the_fixed_point(self, dtype: torch.dtype) -> None:
        problem = SOLVABLE["tanh"](0.5 * self.contraction, dtype)  # an easy one: it is over early
        steps = max(100, self.max_steps // 4)
        with torch.no_grad():
            found = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps, measure=True))
        assert found.relative_residual is not None
        limit = 1e3 * torch.finfo(dtype).eps
        assert (found.relative_residual < limit).all(), (
            f"after {steps} steps relative residuals should be below {limit:.0e}, "
            f"got {found.relative_residual.tolist()}; {self._knobs('max_steps', 'contraction')}"
        )

    @both_dtypes
    @pytest.mark.parametrize("name", ["constant", "at rest", "drift", "two-cycle", "steps"])
    def test_singular_histories_neither_raise_nor_overflow(self, name: str, dtype: torch.dtype) -> None:
        x = normal(3, 4, dtype=dtype)
        f: Callable[[Tensor], Tensor] = {
            "constant": lambda z: x + 0 * z,  # iterates repeat
            "at rest": lambda z: z,  # residuals are zero
            "drift": lambda z: z + x,  # residuals are the same for ever
            "two-cycle": lambda z: 2 * x - z,  # iterates repeat every other step
            "steps": lambda z: (2 * (z / 2 + x)).round() / 2,  # differences are zero or large
        }[name]
        with torch.no_grad():
            for stopping in (Stopping.steps(20), Stopping(rtol=0.0, max_steps=20)):
                value = iterate(f, torch.zeros_like(x), self.solver, stopping).value
                assert value.isfinite().all(), f"{name}: the value should be finite, got {value}"

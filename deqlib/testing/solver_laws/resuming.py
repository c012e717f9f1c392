# ruff: noqa: D102  # the name of a test says what it is about
"""A solve that goes on with what another one learnt."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ..problems import linear
from .base import SOLVABLE, SolverLaws, check_residual, normal, spread


class ResumingLaws(SolverLaws):
    """A solve that goes on with what another one learnt."""

    @pytest.mark.parametrize("name", ["linear", "tanh"])
    def test_going_on_after_a_small_change_takes_no_more_steps_than_a_fresh_solve(self, name: str) -> None:
        problem = SOLVABLE[name](self.contraction, torch.float64)
        before = self._solve(problem, rtol=1e-6)
        x, *rest = problem.inputs
        changed = dataclasses.replace(
            problem, inputs=(x + 1e-3 * normal(*x.shape), *rest), z0=before.value, solution=None
        )
        fresh, resumed = (self._solve(changed, rtol=1e-6, state=state) for state in (None, before.state))
        assert resumed.converged.all(), (
            f"the resumed solve should converge, got {resumed}; {self._knobs('max_steps', 'contraction')}"
        )
        check_residual(changed, resumed)
        limit = int(fresh.num_steps.max()) + self.resume_allowance
        assert int(resumed.num_steps.max()) <= limit, (
            f"with what was learnt {int(resumed.num_steps.max())} steps, without it "
            f"{int(fresh.num_steps.max())}; let resume() keep less, or {self._knobs('resume_allowance')}"
        )

    def test_a_state_of_another_batch_is_refused_or_not_used(self) -> None:
        spectrum = spread(0.5 * self.contraction, 6)
        state = self._solve(linear(spectrum, batch=3, dtype=torch.float64)).state
        other = linear(spectrum, batch=5, dtype=torch.float64)
        try:
            found = self._solve(other, state=state)
        except ValueError:
            return
        assert found.converged.all(), (
            f"a state that does not fit should not be used, got {found}; "
            f"{self._knobs('max_steps', 'contraction', 'rtol')}"
        )

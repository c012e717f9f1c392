"""The law that a sample's refused steps, and what was learnt of it, are its own: for every solver here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, ReversiblePicard, Solver
from deqlib.solvers.base import Seen
from deqlib.testing.company import CompanyConformance


class TestPicard(CompanyConformance):
    solver = Picard()


class TestReversiblePicard(CompanyConformance):
    solver = ReversiblePicard()


class TestAnderson(CompanyConformance):
    solver = Anderson()


class TestAndersonThatRestartsOften(CompanyConformance):
    solver = Anderson(memory=4, growth=2.0, restart=6)


class TestAndersonOfTypeI(CompanyConformance):
    solver = Anderson(memory=4, kind="I", damping=0.8)


class TestBroyden(CompanyConformance):
    solver = Broyden(memory=6, growth=10.0)


class TestNewtonKrylov(CompanyConformance):
    solver = NewtonKrylov()


class TestAuto(CompanyConformance):
    solver = Auto()


class TestAutoThatIsImpatient(CompanyConformance):
    solver = Auto(plain_steps=0, patience=4)
    max_steps: ClassVar[int] = 120


# What breaks it -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NotesTheBatch(Solver):
    """Counts a refused step of all samples where one of them got worse."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return fz, state

    def observe(self, seen: Seen, state: Any) -> Any:
        worse = seen.residual > seen.before
        seen.note("growth", worse.any().expand_as(worse))
        return state


@dataclass(frozen=True, kw_only=True)
class LearnsTheBatch(Solver):
    """Goes on with a damping that is the same for all samples: less where one of them had moved far."""

    def init(self, z0: Tensor) -> Tensor:
        return z0.new_ones(len(z0))

    def step(self, z: Tensor, fz: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.lerp(z, fz, state.unsqueeze(1)), state

    def resume(self, state: Tensor, z0: Tensor) -> Tensor:
        return torch.full_like(state, 1 / (1 + float(z0.norm(dim=1).max())))


@pytest.mark.parametrize(
    ("solver", "law"),
    [
        (NotesTheBatch(), "test_refused_steps_of_a_sample_are_counted_as_they_are_alone"),
        (LearnsTheBatch(), "test_what_was_learnt_of_a_sample_leads_on_as_it_does_alone"),
    ],
)
def test_a_solver_that_mixes_samples_breaks_the_law(solver: Solver, law: str) -> None:
    suite = CompanyConformance()
    suite.solver = solver  # type: ignore[misc]
    with pytest.raises(AssertionError, match="sample"):
        getattr(suite, law)(compact=False)


def test_the_problem_has_refused_steps_and_samples_that_end_apart() -> None:
    suite = CompanyConformance()
    suite.solver = Anderson(memory=4, growth=2.0, restart=6)  # type: ignore[misc]
    gain, x = suite._samples()
    found = suite._solve(gain, x, torch.zeros_like(x))
    assert set(found.rejections) >= {"growth", "stagnation"}
    assert len(set(found.num_steps.tolist())) > 3

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import deqlib.testing
from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver
from deqlib.solvers.base import Seen
from deqlib.testing import Problem, SolverConformance, tanh_rnn


class TestPicard(SolverConformance):
    solver = Picard()


class TestDampedPicard(SolverConformance):
    solver = Picard(damping=0.6)


class TestAnderson(SolverConformance):
    solver = Anderson()


class TestAndersonOfTypeOne(SolverConformance):
    solver = Anderson(kind="I")


class TestDampedAnderson(SolverConformance):
    solver = Anderson(memory=3, damping=0.7)
    resume_allowance = (
        1  # three columns of an earlier solve are soon dropped, and it takes as many to damp them
    )


class TestBroyden(SolverConformance):
    solver = Broyden()


class TestBroydenOfLittleMemory(SolverConformance):
    solver = Broyden(memory=4)
    resume_allowance = 3  # four columns of an earlier solve are soon dropped


class TestNewtonKrylov(SolverConformance):
    solver = NewtonKrylov()


class TestNewtonKrylovWithExactProducts(SolverConformance):
    solver = NewtonKrylov(derivative="jvp")


class TestAuto(SolverConformance):
    solver = Auto()


PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def _documented() -> ModuleType:
    """What the blocks about solvers on the page define; that they run is for `test_docs.py`."""
    text = PAGE.read_text().split("\n## A backward mode\n")[0]
    module = ModuleType("extending")
    sys.modules[module.__name__] = module  # dataclasses look it up
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        if "class " in block:
            exec(block, module.__dict__)
    return module


DOCUMENTED = _documented()


class TestAitken(SolverConformance):
    solver = DOCUMENTED.Aitken()


class TestCautious(SolverConformance):
    solver = DOCUMENTED.Cautious()


# The suite finds faults ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Meets(Solver):
    """Couples the samples: moves all of them by what they have in common."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return fz + 0.01 * (fz - z).mean(0), None


@dataclass(frozen=True, kw_only=True)
class First(Solver):
    """Treats the first sample otherwise than the others."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.cat([torch.lerp(z[:1], fz[:1], 0.5), fz[1:]]), None


@dataclass(frozen=True, kw_only=True)
class Remembers(Solver):
    """Keeps its history on itself."""

    memory: dict[str, Tensor] = field(default_factory=dict, hash=False)

    def init(self, z0: Tensor) -> None:
        self.memory.clear()

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        momentum = 0.1 * (z - self.memory.get("last", z))
        self.memory["last"] = z
        return fz + momentum, None


@dataclass(frozen=True)
class Secants:
    z: Tensor
    fz: Tensor


@dataclass(frozen=True, kw_only=True)
class Raises(Solver):
    """Solves its small system with a routine that refuses singular ones."""

    def init(self, z0: Tensor) -> Secants | None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: Secants | None) -> tuple[Tensor, Secants]:
        if state is None:
            return fz, Secants(z, fz)
        change = (fz - z) - (state.fz - state.z)
        square = (change * change).sum(1)[:, None, None]
        gamma = torch.linalg.solve(square, (change * (fz - z)).sum(1)[:, None, None]).squeeze(2)
        return fz - gamma * (fz - state.fz), Secants(z, fz)


@dataclass(frozen=True, kw_only=True)
class WritesToIterate(Solver):
    """Makes the next iterate in the place of the last."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return z.copy_(fz), None


@dataclass(frozen=True, kw_only=True)
class WritesToImage(Solver):
    """Uses the image as scratch space."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return fz.add_(z).mul_(0.5), None


@dataclass(frozen=True, kw_only=True)
class Stays(Solver):
    """Never moves."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return z, None


@dataclass(frozen=True, kw_only=True)
class DividesByZero(Solver):
    """Aitken's relaxation without a guard for samples at rest."""

    def init(self, z0: Tensor) -> tuple[Tensor, ...]:
        return ()

    def step(self, z: Tensor, fz: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        residual = fz - z
        if not state:
            return fz, (residual, torch.ones_like(z[:, :1]))
        last, omega = state
        change = residual - last
        omega = -omega * (last * change).sum(1, keepdim=True) / (change * change).sum(1, keepdim=True)
        return z + omega * residual, (residual, omega)


@dataclass(frozen=True, kw_only=True)
class SharesAState(Solver):
    """Has a tensor in its state that is not one of samples."""

    def init(self, z0: Tensor) -> Tensor:
        return z0.new_zeros(1)

    def step(self, z: Tensor, fz: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return fz, state + 1


@dataclass(frozen=True, kw_only=True)
class Detaches(Solver):
    """Keeps the iterates off the tape."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return fz.detach(), None


@dataclass(frozen=True, kw_only=True)
class WritesToSeen(Solver):
    """Picard that spoils what it is told."""

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return fz, None

    def observe(self, seen: Seen, state: None) -> None:
        seen.residual.mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class ResumesBadly(Solver):
    """Picard that is slow for as many steps as were taken before."""

    def init(self, z0: Tensor) -> int:
        return 0

    def resume(self, state: int, z0: Tensor) -> int:
        return -state

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        return (fz if state >= 0 else torch.lerp(z, fz, 0.1)), state + 1


FAULTS = [
    (Meets(), "test_a_sample_alone_is_solved_as_in_its_batch", {}),
    (First(), "test_the_order_of_the_samples_does_not_matter", {"seed": 0}),
    (Meets(), "test_a_troubled_batch_mate_changes_nothing_for_the_others", {"trouble": "nan"}),
    (Meets(), "test_a_step_keeps_a_sample_that_is_not_finite_to_itself", {"bad": float("inf")}),
    (Remembers(), "test_the_state_lives_outside_of_the_solver", {}),
    (
        Raises(),
        "test_singular_histories_neither_raise_nor_overflow",
        {"name": "at rest", "dtype": torch.float64},
    ),
    (Raises(), "test_a_sample_at_its_fixed_point_stays_there", {"dtype": torch.float32}),
    (WritesToIterate(), "test_neither_an_iterate_nor_an_image_is_written_to", {"grad": False}),
    (WritesToImage(), "test_neither_an_iterate_nor_an_image_is_written_to", {"grad": False}),
    (
        Stays(),
        "test_known_fixed_points_are_reached_at_the_tolerance_asked",
        {"name": "linear", "dtype": torch.float32},
    ),
    (Stays(), "test_random_contractions_are_solved", {}),
    (Stays(), "test_a_constant_map_is_solved", {"dtype": torch.float32}),
    (Stays(), "test_it_solves_adjoints", {"name": "linear"}),
    (DividesByZero(), "test_a_sample_at_its_fixed_point_stays_there", {"dtype": torch.float32}),
    (DividesByZero(), "test_gradients_through_the_steps_are_finite", {}),
    (SharesAState(), "test_every_tensor_of_the_state_has_the_batch_first", {"steps": 1}),
    (Detaches(), "test_the_gradient_through_the_steps_is_that_of_the_fixed_point", {"name": "tanh"}),
    (WritesToSeen(), "test_what_it_is_told_is_not_written_to", {}),
    (
        ResumesBadly(),
        "test_going_on_after_a_small_change_takes_no_more_steps_than_a_fresh_solve",
        {"name": "linear"},
    ),
]

# What is said of failures of what a solver need not promise.
KNOBS = {
    "test_known_fixed_points_are_reached_at_the_tolerance_asked": ["max_steps", "contraction", "rtol"],
    "test_random_contractions_are_solved": ["max_steps", "contraction", "rtol"],
    "test_a_constant_map_is_solved": ["max_steps", "rtol"],
    "test_it_solves_adjoints": ["max_steps", "contraction"],
    "test_the_gradient_through_the_steps_is_that_of_the_fixed_point": ["differentiable"],
    "test_going_on_after_a_small_change_takes_no_more_steps_than_a_fresh_solve": ["resume_allowance"],
}


class Drawn:
    """Stands for hypothesis."""

    def draw(self, strategy: object) -> Problem:
        return tanh_rnn(batch=3, width=5, rate=0.5, dtype=torch.float64)


def _name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__ if isinstance(value, Solver) else ""


@pytest.mark.parametrize(("solver", "law", "case"), FAULTS, ids=_name)
def test_a_faulty_solver_fails_the_law_that_it_breaks(solver: Solver, law: str, case: dict[str, Any]) -> None:
    class Suite(SolverConformance):
        pass

    Suite.solver = solver
    test = getattr(SolverConformance, law)
    if hasattr(test, "hypothesis"):  # one example, to save the time that hypothesis takes to shrink it
        test, case = test.hypothesis.inner_test, {"data": Drawn(), **case}
    with pytest.raises(Exception) as caught:  # noqa: PT011  # a law fails by an assertion, or by what it met
        test(Suite(), **case)
    assert isinstance(caught.value, AssertionError | RuntimeError), repr(caught.value)
    for knob in KNOBS.get(law, []):
        assert f"`{knob}` (now {getattr(Suite, knob)})" in str(caught.value)


def test_every_knob_is_explained_and_named_by_a_failure() -> None:
    declared = {name for kind in SolverConformance.__mro__ for name in inspect.get_annotations(kind)}
    knobs = declared - {"solver"}
    text = PAGE.read_text()
    for name in knobs:
        assert f"\n        {name}: " in (SolverConformance.__doc__ or ""), name
        assert f"\n| `{name}` | " in text, name
    assert {knob for named in KNOBS.values() for knob in named} == knobs


@pytest.mark.parametrize("name", ["SolverConformance", "CellConformance"])
def test_the_page_counts_the_laws(name: str) -> None:
    laws = [law for law in dir(getattr(deqlib.testing, name)) if law.startswith("test_")]
    assert f"`{name}` has {len(laws)} laws" in " ".join(PAGE.read_text().split())

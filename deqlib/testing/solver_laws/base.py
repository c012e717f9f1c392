"""What the laws of solvers share: settings, problems, and ways to solve and compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from ...fixed_point import fixed_point
from ...solution import Solution
from ...solvers import Solver
from ...stopping import Stopping
from ..problems import (
    Problem,
    convolution,
    drift,
    expanding,
    explosion,
    linear,
    mixed_difficulty,
    mlp,
    tanh_rnn,
    two_cycle,
)

# Subclasses run the same function on objects of their own, which hypothesis would take for a mistake.
random_data = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors])

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

# Contractions at small sizes, of the given rate where the constructor knows it. Seeds leave no rate above it.
SOLVABLE: dict[str, Callable[[float, torch.dtype], Problem]] = {
    "linear": lambda rate, dtype: linear(spread(rate, 24), dtype=dtype),
    "non-normal": lambda rate, dtype: linear(spread(rate, 24), non_normality=0.5, dtype=dtype),
    "tanh": lambda rate, dtype: tanh_rnn(width=24, rate=rate, dtype=dtype),
    "mixed": lambda rate, dtype: mixed_difficulty(
        batch=6, width=24, easy=0.3 * rate, hard=rate, num_hard=2, dtype=dtype
    ),
    "mlp": lambda rate, dtype: mlp(batch=3, tokens=4, width=12, gain=0.6, injection=3.0, dtype=dtype),
    "convolution": lambda rate, dtype: convolution(
        batch=2, channels=4, side=4, gain=0.5, injection=3.0, dtype=dtype
    ),
}

# Problems that need not be solved.
HARD: dict[str, Callable[[torch.dtype], Problem]] = {
    "two-cycle": lambda dtype: two_cycle(dtype=dtype),
    "drift": lambda dtype: drift(dtype=dtype),
    "explosion": lambda dtype: explosion(dtype=dtype),
    "expanding": lambda dtype: expanding(width=12, dtype=dtype),
    "strongly expanding": lambda dtype: expanding(width=12, rate=1e3, dtype=dtype),
}


class SolverLaws:
    """What laws share: the settings of a suite, see `SolverConformance`, and ways to solve and compare."""

    solver: ClassVar[Solver]
    max_steps: ClassVar[int] = 400
    contraction: ClassVar[float] = 0.8
    rtol: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.float64: 1e-9}
    differentiable: ClassVar[bool] = True
    resume_allowance: ClassVar[int] = 0

    def _knobs(self, *names: str) -> str:
        """What to do about a failure of what a solver need not promise."""
        now = [f"`{name}` (now {getattr(self, name)})" for name in names]
        return f"if the solver does not promise this, change {' or '.join(now)} on the test class"

    def _solve(self, problem: Problem, *, compact: bool = False, state: Any = None, **rule: Any) -> Solution:
        """Off the tape, to the tolerance of the dtype unless `rule` has fields of `Stopping`."""
        defaults = {"rtol": self.rtol.get(problem.z0.dtype), "max_steps": self.max_steps, "patience": None}
        with torch.no_grad():
            return fixed_point(
                problem.cell,
                problem.z0,
                problem.inputs,
                solver=self.solver,
                stopping=Stopping(**{**defaults, **rule}),
                on_failure="ignore",
                compact=compact,
                state=state,
            )

    def _check_same(self, found: Solution, expected: Solution, what: str, *, exact: bool = False) -> None:
        """Same statuses, steps and values: to the last bit, or but for rounding."""
        assert found.status.tolist() == expected.status.tolist(), (
            f"{what}: statuses {found.status.tolist()} should be {expected.status.tolist()}"
        )
        assert found.num_steps.tolist() == expected.num_steps.tolist(), (
            f"{what}: steps {found.num_steps.tolist()} should be {expected.num_steps.tolist()}"
        )
        if exact:
            assert torch.equal(found.value, expected.value), f"{what}: values should be equal to the last bit"
        else:
            torch.testing.assert_close(
                found.value, expected.value, rtol=1e-7, atol=1e-7, msg=lambda text: f"{what}: {text}"
            )


def spread(rate: float, width: int) -> Tensor:
    """Eigenvalues from -rate to rate, float64, (width,)."""
    return torch.linspace(-rate, rate, width, dtype=torch.float64)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def part_of(solution: Solution, rows: list[int]) -> Solution:
    """What a solution says of some samples."""
    return dataclasses.replace(
        solution, value=solution.value[rows], status=solution.status[rows], num_steps=solution.num_steps[rows]
    )


def check_residual(problem: Problem, found: Solution) -> None:
    """Fail unless the residual reported is that of the value."""
    residual, _ = problem.residuals(found.value)
    assert found.residual is not None
    rounding = 20 * torch.finfo(residual.dtype).eps * float(found.value.flatten(1).norm(dim=1).max())
    torch.testing.assert_close(
        found.residual,
        residual,
        rtol=1e-3,
        atol=rounding,
        msg=lambda text: f"{problem.name}: the residual reported should be that of the value: {text}",
    )


def check_no_worse(problem: Problem, found: Solution) -> None:
    """Fail where the value is worse than the starting point."""
    start = problem.residuals(problem.z0)[0]
    assert found.residual is not None
    # Where f(z) is large, a residual within the tolerance may be larger than that of the start.
    assert ((found.residual <= start * (1 + 1e-6)) | found.converged).all(), (
        f"{problem.name}: residuals {found.residual.tolist()} are worse than at the start, {start.tolist()}"
    )

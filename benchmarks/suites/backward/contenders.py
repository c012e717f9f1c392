"""Backward modes by name, each with the solver of its forward solve; torchdeq's beside; and what they get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqlib import (
    JFB,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
)
from deqlib.testing import Problem

from ...maps import solve

ADJOINT = Stopping(rtol=1e-4, max_steps=50)  # deqlib's default, given to torchdeq as well
MODES: dict[str, tuple[Backward, Solver]] = {
    "ImplicitDifferentiation": (ImplicitDifferentiation(), Picard()),
    "ImplicitDifferentiation, Picard": (ImplicitDifferentiation(solver=Picard(), stopping=ADJOINT), Picard()),
    "SharedInverse": (SharedInverse(), Broyden()),
    "SharedInverse, 5 refining steps": (SharedInverse(refine=5), Broyden()),
    "PhantomGradient, 5 steps": (PhantomGradient(), Picard()),
    "PhantomGradient, Neumann": (PhantomGradient(form="neumann"), Picard()),
    "JFB": (JFB(), Picard()),
    # The means of the numbers that its default draws.
    "StochasticJFB, 5 + 6 steps": (StochasticJFB(no_grad=(5, 5), grad=(6, 6)), Picard()),
    "Unroll": (Unroll(), Picard()),
    "Unroll, checkpoint": (Unroll(checkpoint=True), Picard()),
    # How far it drifts is measured here as the error of its gradient.
    "Reversible": (Reversible(on_drift="ignore"), ReversiblePicard()),
}
# Settings of torchdeq's layers.
PEERS: dict[str, dict[str, Any]] = {
    "torchdeq ift": {"ift": True},
    "torchdeq hook_ift": {"hook_ift": True},
    "torchdeq grad=1": {"grad": 1},
    "torchdeq grad=5, tau=0.5": {"grad": 5, "tau": 0.5},
}


def solved(mode: Backward, solver: Solver, problem: Problem, stopping: Stopping) -> Tensor:
    """The fixed point carrying gradient, by deqlib."""
    value: Tensor = solve(problem, solver, stopping, backward=mode).value
    return value


def trained(problem: Problem) -> Problem:
    """The problem with inputs that require gradient."""
    return replace(problem, inputs=tuple(x.detach().clone().requires_grad_() for x in problem.inputs))


def at_solution(problem: Problem) -> Problem:
    """The problem started at its solution, with inputs that require gradient."""
    assert problem.solution is not None
    return replace(trained(problem), z0=problem.solution)


def cotangent(problem: Problem) -> Tensor:
    """The gradient of a loss at the fixed point."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(problem.z0.shape, generator=generator, dtype=torch.float64).to(problem.z0)

"""Solves of a fixed number of steps, and their gradients, each on the device that it is given."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from waits import Case, look_at_nothing, runs_backward

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    ReversiblePicard,
    SharedInverse,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
)

SOLVERS: dict[str, Solver] = {
    "picard": Picard(damping=0.5),
    "reversible": ReversiblePicard(),
    "anderson": Anderson(memory=3),
    "anderson I": Anderson(memory=3, kind="I"),
    "broyden": Broyden(memory=3),
    "newton": NewtonKrylov(),
    "newton jvp": NewtonKrylov(derivative="jvp"),
    "gmres": GMRES(),
    "auto": Auto(),
}
STEPS = Stopping.steps(4)
MODES: dict[str, tuple[Solver, Backward]] = {
    "unroll": (Picard(), Unroll()),
    "unroll, checkpointed": (Picard(), Unroll(checkpoint=True)),
    "unroll of anderson": (Anderson(memory=3), Unroll()),
    "implicit": (Picard(), ImplicitDifferentiation(stopping=STEPS)),
    "implicit by anderson": (Picard(), ImplicitDifferentiation(solver=Anderson(memory=3), stopping=STEPS)),
    "implicit by gmres": (Picard(), ImplicitDifferentiation(solver=GMRES(), stopping=STEPS)),
    "jfb": (Broyden(memory=3), JFB()),
    "phantom": (Picard(), PhantomGradient(steps=3)),
    "phantom, neumann": (Picard(), PhantomGradient(steps=3, form="neumann")),
    "stochastic": (Picard(), StochasticJFB(no_grad=(1, 3), grad=(1, 3))),
    "stochastic, each sample": (Picard(), StochasticJFB(no_grad=(1, 3), grad=2, per_sample=True)),
    "shared": (Broyden(memory=3), SharedInverse()),
    "shared, refined": (Anderson(memory=3), SharedInverse(refine=3)),
}


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Have the library take the device of a case for a GPU, and let alone what reads the host's numbers."""
    look_at_nothing(patch)
    patch.setattr(StochasticJFB, "_draw", lambda self, bounds: bounds[1])
    patch.setattr(StochasticJFB, "_drawn_for_each", lambda self, batch: ([*range(batch)], [2] * batch))


def solve(device: str, solver: Solver, backward: Backward | None = None, *, measure: bool = False) -> None:
    weight = (0.1 * torch.eye(5, device=device)).requires_grad_(backward is not None)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    layer = ImplicitLayer(
        cell, solver=solver, stopping=Stopping.steps(4, measure=measure), backward=backward or Unroll()
    )
    x = torch.ones(3, 5, device=device, requires_grad=backward is not None)
    z = layer(x)
    if backward is not None and runs_backward(device):
        z.square().sum().backward()


CASES: dict[str, Case] = {
    **{name: partial(solve, solver=solver, measure=True) for name, solver in SOLVERS.items()},
    **{
        f"gradient, {name}": partial(solve, solver=solver, backward=backward)
        for name, (solver, backward) in MODES.items()
    },
}

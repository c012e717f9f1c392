"""Random contractions with weights of no symmetry, and the tools to look into a solve.

The problems of `deqlib.testing` are drawn from their fixed points, and many of their Jacobians are symmetric
there. Gradients are tested on these, where a transposed matrix is another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import Anderson, Broyden, Picard, Solver
from deqlib.testing import Problem

TIGHT = 1e-13  # relative residual at which a float64 solve counts as exact

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.6),
    "anderson memory 1": Anderson(memory=1),
    "anderson": Anderson(),
    "anderson damped": Anderson(memory=3, damping=0.7),
    "anderson memory beyond the dimension": Anderson(memory=12),
    "broyden": Broyden(memory=60),
    "broyden memory below the steps": Broyden(memory=4),
}


def solution_of(problem: Problem) -> Tensor:
    """The fixed point of a contraction in float64, with the inputs as they are, whatever their dtype."""
    inputs = [t.detach().double() for t in problem.inputs]
    z = torch.zeros_like(inputs[0])
    for _ in range(2000):
        z, previous = problem.cell(z, *inputs), z
        if torch.equal(z, previous):
            break
    return z


def sample_of(problem: Problem, index: int) -> Problem:
    """The same problem for one sample alone; only its first input has samples."""
    x, *weights = problem.inputs
    rows = slice(index, index + 1)
    return replace(problem, z0=problem.z0[rows], inputs=(x[rows], *weights))


def lipschitz(problem: Problem) -> float:
    """Bound on the Lipschitz constant of a cell of `problem` in z, Euclidean norm."""
    return math.prod(float(torch.linalg.matrix_norm(weight.double(), 2)) for weight in problem.inputs[1:])


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _with_norm(matrix: Tensor, norm: float) -> Tensor:
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


def _linear_cell(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return z @ w + x


def _tanh_cell(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w + x)


def _mlp_cell(z: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return x + torch.tanh(z @ w1 + 0.3) @ w2


def problem(
    kind: str = "tanh",
    batch: int = 3,
    dim: int = 5,
    contraction: float = 0.6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A random contraction: "linear", "tanh" or "mlp".

    `contraction` is the product of the norms of its weights, which bounds its Lipschitz constant. Its inputs
    are x (batch, dim) and the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    x = _normal(generator, batch, dim)
    if kind == "mlp":
        w1 = _with_norm(_normal(generator, dim, dim + 3), contraction)
        w2 = _with_norm(_normal(generator, dim + 3, dim), 1.0)
        tensors, cell = (x, w1, w2), _mlp_cell
    else:
        tensors = (x, _with_norm(_normal(generator, dim, dim), contraction))
        cell = {"linear": _linear_cell, "tanh": _tanh_cell}[kind]
    return made(cell, *tensors, name=kind).to(dtype)


def made(cell: Callable[..., Tensor], *inputs: Tensor, name: str = "made for a test") -> Problem:
    """A problem that starts from zeros shaped like its first input; its solution is not computed."""
    return Problem(name, cell, torch.zeros_like(inputs[0]), inputs, None)


KINDS = ("linear", "tanh", "mlp")


@st.composite
def problems(draw: Any, *, max_contraction: float = 0.9, dtype: torch.dtype | None = None) -> Problem:
    """Random contractions of every kind, float32 and float64 unless `dtype` is given."""
    return problem(
        kind=draw(st.sampled_from(KINDS)),
        batch=draw(st.integers(1, 4)),
        dim=draw(st.integers(1, 9)),
        contraction=draw(st.floats(0.05, max_contraction)),
        dtype=dtype or draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass
class Spy:
    """A cell that remembers every evaluation."""

    cell: Callable[..., Any]
    states: list[Any] = field(default_factory=list)  # what it was given
    outputs_on_tape: list[bool] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.states)

    def __call__(self, z: Any, *inputs: Any) -> Any:
        self.states.append(z.detach().clone() if isinstance(z, Tensor) else z)
        output = self.cell(z, *inputs)
        self.outputs_on_tape.append(isinstance(output, Tensor) and output.requires_grad)
        return output


class Cell(nn.Module):
    """tanh(W z + b + x) on states of `dim` numbers, a contraction."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        with torch.no_grad():
            self.inner.weight *= 0.5

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def as_pytree(base: Problem) -> tuple[Callable[[Any], Any], Any]:
    """A problem of 3 samples of 7 numbers as one of a dict with a tuple in it, and its starting point."""

    def cell(state: dict[str, Any]) -> dict[str, Any]:
        h, (image,) = state["h"], state["rest"]
        flat = base.f(torch.cat([h, image.flatten(1)], 1))
        return {"h": flat[:, :3], "rest": (flat[:, 3:].unflatten(1, (2, 2)),)}

    z0 = {"h": torch.zeros(3, 3, dtype=torch.float64), "rest": (torch.zeros(3, 2, 2, dtype=torch.float64),)}
    return cell, z0


def dense_jacobian(problem: Problem, z: Tensor) -> Tensor:
    """J (B*D, B*D) of the cell at z, all samples as one vector."""
    flat = lambda v: problem.f(v.view_as(z)).flatten()  # noqa: E731
    return torch.autograd.functional.jacobian(flat, z.detach().flatten())


def dense_gradients(
    problem: Problem, g: Tensor, adjoint: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Gradients of <g, z*> with respect to the problem's inputs, from dense float64 linear algebra.

    `adjoint(J^T, g)` gives u; default solves (I - J^T) u = g.
    """
    z = solution_of(problem)
    transposed = dense_jacobian(problem, z).T.detach()
    if adjoint is None:
        u = torch.linalg.solve(torch.eye(len(transposed), dtype=z.dtype) - transposed, g.flatten())
    else:
        u = adjoint(transposed, g.flatten())
    return torch.autograd.grad(problem.f(z), problem.inputs, u.view_as(z))

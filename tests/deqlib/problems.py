"""Random contractions with known fixed points, and the tools to look into a solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import Anderson, Broyden, Picard, Solver

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


@dataclass(frozen=True)
class Problem:
    """z = cell(z, *tensors), a contraction of every sample (row) by itself."""

    cell: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]  # the input x (B, D) first, then the parameters
    contraction: float  # Lipschitz constant of the cell in z, Euclidean norm

    @property
    def x(self) -> Tensor:
        return self.tensors[0]

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x)

    def f(self, z: Tensor) -> Tensor:
        return self.cell(z, *self.tensors)

    def exact(self) -> Tensor:
        """The fixed point in float64, of the cell with the tensors as they are, whatever their dtype."""
        tensors = [t.detach().double() for t in self.tensors]
        z = torch.zeros_like(tensors[0])
        for _ in range(2000):
            z, previous = self.cell(z, *tensors), z
            if torch.equal(z, previous):
                break
        return z

    def requiring_grad(self) -> Problem:
        return Problem(
            self.cell, tuple(t.detach().clone().requires_grad_() for t in self.tensors), self.contraction
        )

    def sample(self, index: int) -> Problem:
        """The same problem for one sample alone."""
        return Problem(self.cell, (self.x[index : index + 1], *self.tensors[1:]), self.contraction)


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
    """A random contraction: "linear", "tanh" or "mlp"."""
    generator = torch.Generator().manual_seed(seed)
    x = _normal(generator, batch, dim)
    if kind == "mlp":
        w1 = _with_norm(_normal(generator, dim, dim + 3), contraction)
        w2 = _with_norm(_normal(generator, dim + 3, dim), 1.0)
        tensors, cell = (x, w1, w2), _mlp_cell
    else:
        tensors = (x, _with_norm(_normal(generator, dim, dim), contraction))
        cell = {"linear": _linear_cell, "tanh": _tanh_cell}[kind]
    return Problem(cell, tuple(t.to(dtype) for t in tensors), contraction)


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


def residuals(f: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Residual and relative residual of every sample at z, recomputed."""
    with torch.no_grad():
        z = z.detach()
        fz = f(z)
        residual = (fz - z).flatten(1).norm(dim=1)
        return residual, residual / fz.flatten(1).norm(dim=1)


def dense_jacobian(problem: Problem, z: Tensor) -> Tensor:
    """J (B*D, B*D) of the cell at z, all samples as one vector."""
    flat = lambda v: problem.f(v.view_as(z)).flatten()  # noqa: E731
    return torch.autograd.functional.jacobian(flat, z.detach().flatten())


def dense_gradients(
    problem: Problem, g: Tensor, adjoint: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Gradients of <g, z*> with respect to the problem's tensors, from dense float64 linear algebra.

    `adjoint(J^T, g)` gives u; default solves (I - J^T) u = g.
    """
    z = problem.exact()
    transposed = dense_jacobian(problem, z).T.detach()
    if adjoint is None:
        u = torch.linalg.solve(torch.eye(len(transposed), dtype=z.dtype) - transposed, g.flatten())
    else:
        u = adjoint(transposed, g.flatten())
    return torch.autograd.grad(problem.f(z), problem.tensors, u.view_as(z))

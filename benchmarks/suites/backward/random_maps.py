"""Random maps whose gradients are known from dense linear algebra in float64.

They are made backwards: the fixed point is drawn first, and a scale gives the Jacobian there the norm,
or the spectral radius, that is asked for. The reference knows J as a matrix and shares no code with deqlib.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlib import JFB, Backward, PhantomGradient, Picard, Stopping, fixed_point

FORWARD = Stopping(rtol=1e-13, max_steps=5000, patience=None)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Series:
    """A cheap mode and what it should compute.

    With b = damping: u = b sum_{i < steps} (b J^T + (1 - b) I)^i g.
    """

    mode: Backward
    steps: int
    damping: float

    def adjoint(self, transposed: Tensor, g: Tensor) -> Tensor:
        """u (N,) of J^T (N, N) and g (N,)."""
        step = self.damping * transposed + (1 - self.damping) * _identity(g)
        terms = [g]
        for _ in range(self.steps - 1):
            terms.append(step @ terms[-1])
        return self.damping * torch.stack(terms).sum(0)


def _phantoms() -> dict[str, Series]:
    found = {}
    for form in ("unroll", "neumann"):
        for steps, damping in ((5, 0.5), (3, 1.0), (10, 0.8)):
            mode = PhantomGradient(steps=steps, damping=damping, form=form)
            found[f"PhantomGradient, {form}, {steps} steps, damping {damping}"] = Series(mode, steps, damping)
    return found


CHEAP: dict[str, Series] = {"JFB": Series(JFB(), 1, 1.0), **_phantoms()}


def _linear(z: Tensor, w: Tensor) -> Tensor:
    return z @ w


def _tanh(z: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w)


def _mlp(z: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.tanh(z @ w1 + 0.3) @ w2


def _attention(z: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens (B, L, C)."""
    weights = ((z @ q) @ (z @ k).mT / math.sqrt(z.shape[-1])).softmax(-1)
    return torch.tanh(weights @ (z @ v))


# The map without scale and input, and the shapes of its weights at width n.
KINDS: dict[str, tuple[Callable[..., Tensor], Callable[[int], list[tuple[int, int]]]]] = {
    "linear": (_linear, lambda n: [(n, n)]),
    "tanh": (_tanh, lambda n: [(n, n)]),
    "mlp": (_mlp, lambda n: [(n, n + 3), (n + 3, n)]),
    "attention": (_attention, lambda n: [(n, n)] * 3),
}


@dataclass(frozen=True)
class RandomMap:
    """f(z) = x + scale * update(z, *weights) with a known fixed point, all float64, all from one seed."""

    name: str
    update: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]  # x (B, ...) and the weights, requiring gradient
    scale: float
    solution: Tensor  # (B, ...)
    start: Tensor  # near the solution or at it: J is known there only
    g: Tensor  # gradient of the loss at the solution
    is_tree: bool  # whether deqlib sees the state cut in two

    def f(self, z: Tensor) -> Tensor:
        """The map."""
        x, *weights = self.leaves
        return x + self.scale * self.update(z, *weights)

    def cut(self, z: Tensor) -> Any:
        """The state as deqlib sees it."""
        if not self.is_tree:
            return z
        return {"head": z[..., :1].contiguous(), "tail": [z[..., 1:].contiguous()]}

    def joined(self, z: Any) -> Tensor:
        """The opposite of `cut`."""
        return torch.cat([z["head"], *z["tail"]], -1) if self.is_tree else z


def draw(seed: int, radius: float | None = None, device: torch.device = CPU) -> RandomMap:
    """The map of this seed: with a Jacobian of random norm below 0.9, or of the given spectral radius.

    The radius is the factor by which Picard shrinks a residual in the long run. All devices get the same.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind = choose.choice(list(KINDS))
    batch, width, tokens = choose.randint(1, 4), choose.randint(2, 8), choose.randint(1, 4)
    norm = choose.uniform(0.05, 0.9)
    is_tree = choose.random() < 0.3
    update, shapes = KINDS[kind]
    weights = [normal(*shape) / math.sqrt(shape[0]) for shape in shapes(width)]
    solution = normal(batch, tokens, width) if kind == "attention" else normal(batch, width)
    jacobian = _jacobian(lambda z: update(z, *weights), solution)
    if radius is None:
        scale = norm / float(torch.linalg.matrix_norm(jacobian, 2))
    else:
        scale = radius / float(torch.linalg.eigvals(jacobian).abs().max())
    x = solution - scale * update(solution, *weights)
    # From elsewhere an iteration of a given radius, but of any norm, need not arrive.
    start = solution + 1e-2 * normal(*solution.shape) if radius is None else solution
    return RandomMap(
        name=f"{kind}{', pytree' * is_tree}, state {tuple(solution.shape)}, seed {seed}",
        update=update,
        leaves=tuple(leaf.to(device).requires_grad_() for leaf in (x, *weights)),
        scale=scale,
        solution=solution.to(device),
        start=start.to(device),
        g=normal(*solution.shape).to(device),
        is_tree=is_tree,
    )


def _jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """J (N, N) of all samples as one vector."""

    def flat_map(v: Tensor) -> Tensor:
        return f(v.view_as(z)).flatten()

    found: Tensor = torch.autograd.functional.jacobian(flat_map, z.flatten())  # type: ignore[no-untyped-call]
    return found.detach()


def _identity(g: Tensor) -> Tensor:
    return torch.eye(len(g), dtype=g.dtype, device=g.device)


def exact(transposed: Tensor, g: Tensor) -> Tensor:
    """u = (I - J^T)^{-1} g."""
    u: Tensor = torch.linalg.solve(_identity(g) - transposed, g)
    return u


def reference(problem: RandomMap, adjoint: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All gradients in one vector, given what `adjoint(J^T, g)` says u is."""
    transposed = _jacobian(problem.f, problem.solution).T
    u = adjoint(transposed, problem.g.flatten()).view_as(problem.solution)
    return flat(torch.autograd.grad(problem.f(problem.solution), problem.leaves, u))


def gradients(problem: RandomMap, mode: Backward) -> Tensor:
    """All gradients in one vector, by deqlib."""
    solution = fixed_point(
        lambda z: problem.cut(problem.f(problem.joined(z))),
        problem.cut(problem.start),
        solver=Picard(),
        stopping=FORWARD,
        backward=mode,
        on_failure="ignore",
    )
    return flat(torch.autograd.grad(problem.joined(solution.value), problem.leaves, problem.g))


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    """All of them in one vector."""
    return torch.cat([part.flatten() for part in parts])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, infinite if it is not a number."""
    error = float((found - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf

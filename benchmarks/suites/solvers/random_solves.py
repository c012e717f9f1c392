"""Small random maps, hopeless ones among them, each with the settings of its solve, all from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver, Stopping

LARGEST_EXPONENT = 30  # states are scaled by up to 10 to this power, and down likewise
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _affine(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    # A sum in a fixed order: products of matrices may round differently when samples leave the batch.
    return (z.unsqueeze(2) * a).sum(1) + x


def _limited(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Not defined far from the origin."""
    inside = torch.linalg.vector_norm(z, dim=1, keepdim=True) < 3
    return torch.where(inside, _affine(z, x, a), torch.nan)


def _cliff(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Infinite far from the origin."""
    return torch.where(z.abs() < 3, _affine(z, x, a), torch.inf)


# z (B, D), x (B, D), a (B, D, D) -> (B, D)
MAPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": _affine,
    "non-normal": _affine,
    "singular": _affine,
    "tanh": lambda z, x, a: torch.tanh(_affine(z, x, a)),
    "relu": lambda z, x, a: torch.relu(_affine(z, x, a)),
    "constant": lambda z, x, a: x + torch.zeros_like(z),
    "zero": lambda z, x, a: torch.zeros_like(z),
    "identity": lambda z, x, a: z,
    "two-cycle": lambda z, x, a: 2 * x - z,
    "drift": lambda z, x, a: z + x,
    "explosion": lambda z, x, a: z.square() + 1 + x.abs(),
    "jump": lambda z, x, a: torch.where(z > x, -1.0, 1.0).to(z.dtype),
    "limited": _limited,
    "cliff": _cliff,
}


@dataclass(frozen=True)
class RandomSolve:
    """A map and the settings of its solve, all from one seed."""

    seed: int
    kind: str
    z0: Tensor  # (B, D)
    x: Tensor  # (B, D)
    a: Tensor  # (B, D, D)
    scale: Tensor  # (B, 1), f(z) = scale * map(z / scale)
    poison: Tensor  # (B, 1), added to f(z): 0, NaN or infinity
    solver: Solver
    stopping: Stopping
    compact: bool

    def f(self, z: Tensor, ids: Tensor) -> Tensor:
        """The map for the samples with these numbers."""
        scale, poison = self.scale[ids], self.poison[ids]
        if self.kind == "identity" and not bool(poison.isnan().any() | poison.isinf().any()):
            return z  # the very tensor that came in
        return scale * MAPS[self.kind](z / scale, self.x[ids], self.a[ids]) + poison

    def to(self, device: torch.device) -> RandomSolve:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)

    def __str__(self) -> str:
        batch, width = self.z0.shape
        dtype = str(self.z0.dtype).removeprefix("torch.")
        scales = f", scale {self.scale.tolist()}" if bool((self.scale != 1).any()) else ""
        poison = f", poison {self.poison.flatten().tolist()}" if bool((self.poison != 0).any()) else ""
        return (
            f"{self.kind} {batch}x{width} {dtype}{scales}{poison}, {self.solver}, {self.stopping}, "
            f"compact={self.compact}"
        )


def draw(seed: int, largest_exponent: float = LARGEST_EXPONENT) -> RandomSolve:
    """The case of this seed."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kind, dtype = choose.choice(list(MAPS)), choose.choice(DTYPES)
    batch, width = choose.choice([0, 1, 1, 2, 3, 4, 4]), choose.choice([1, 1, 2, 3, 4, 6])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.ones(batch, 1, dtype=torch.float64)
    if choose.random() < 0.2:
        exponents = 2 * torch.rand(batch, 1, generator=generator, dtype=torch.float64) - 1
        scale = 10 ** (largest_exponent * exponents)
    z0 = normal(batch, width) * scale if choose.random() < 0.5 else torch.zeros(batch, width)
    poison = torch.zeros(batch, 1)
    if batch and choose.random() < 0.15:
        value = choose.choice([math.nan, math.inf, -math.inf])
        (z0 if choose.random() < 0.2 else poison)[choose.randrange(batch)] = value
    return RandomSolve(
        seed=seed,
        kind=kind,
        z0=z0.to(dtype),
        x=normal(batch, width).to(dtype),
        a=_matrices(kind, batch, width, choose, normal).to(dtype),
        scale=scale.to(dtype),
        poison=poison.to(dtype),
        solver=_solver(choose),
        stopping=Stopping(
            rtol=10 ** choose.uniform(-6, -1),
            atol=choose.choice([0.0, 0.0, 1e-4]),
            max_steps=choose.randint(1, 40),
            check_every=choose.choice([1, 1, 2, 5]),
            patience=choose.choice([None, 1, 3, 10, 25]),
            blowup=choose.choice([10.0, 1e6]),
        ),
        compact=choose.random() < 0.4,
    )


def _matrices(
    kind: str, batch: int, width: int, choose: random.Random, normal: Callable[..., Tensor]
) -> Tensor:
    """(B, D, D), of a spectral radius up to 1.5."""
    radius = choose.uniform(0, 1.5)
    if kind == "tanh":
        return normal(batch, width, width) * choose.uniform(0, 5)
    values = normal(batch, width).clamp(-1, 1) * radius
    if kind == "singular":
        values[:, 0] = 1
    schur = torch.diag_embed(values)
    if kind == "non-normal":
        schur = schur + torch.triu(normal(batch, width, width), 1) * choose.choice([1, 10])
    basis: Tensor = torch.linalg.qr(normal(batch, width, width))[0]
    return basis @ schur @ basis.mT


def _solver(choose: random.Random, kinds: int = 5) -> Solver:
    """One of the first so many kinds of solvers, `Auto` the last of them."""
    growth = choose.choice([1.0, 10.0, 1e4, math.inf])
    restart = choose.choice([None, 1, 5, 25])
    match choose.randrange(kinds):
        case 0:
            return Picard(damping=choose.choice([1, 0.5]))
        case 1:
            return Anderson(
                memory=choose.randint(1, 8),
                ridge=choose.choice([0, 1e-7, 1e-2]),
                damping=choose.choice([1, 0.7]),
                kind=choose.choice(["I", "II"]),
                growth=growth,
                restart=restart,
            )
        case 2:
            return Broyden(memory=choose.randint(1, 10), growth=growth, restart=restart)
        case 3:
            return NewtonKrylov(
                memory=choose.randint(1, 8),
                derivative=choose.choice(["difference", "jvp"]),
                forcing=choose.choice([0.01, 0.1, 0.9]),
                max_backtracks=choose.randint(0, 4),
            )
        case _:
            patience = choose.choice([1, 3, 10])
            plain_steps = choose.choice([0, 4, 18])
            if choose.random() < 0.5:
                return Auto(patience=patience, plain_steps=plain_steps)
            methods = tuple(_solver(choose, 4) for _ in range(choose.randint(1, 3)))
            return Auto(methods=methods, patience=patience, plain_steps=plain_steps)

"""Gradients on random problems against dense linear algebra in float64.

Problems are made backwards: the fixed point is drawn first, and a scale gives the Jacobian there the norm,
or the spectral radius, that is asked for. The reference knows J as a matrix and shares no code with deqlib.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Solver,
    Stopping,
    fixed_point,
)

from ...report import Bar

EXACT_LIMIT, SERIES_LIMIT = 1e-6, 1e-10
FACTORS = (0.5, 0.8, 0.9, 0.95)  # spectral radii of the table of cosines
COSINE_CASES = 40  # problems at each of them
FORWARD = Stopping(rtol=1e-13, max_steps=5000, patience=None)
ADJOINT = Stopping(rtol=1e-8, max_steps=1000)

SOLVERS: dict[str, Solver] = {
    "Auto": Auto(),
    "Picard": Picard(),
    "Picard, damped": Picard(damping=0.7),
    "Anderson": Anderson(),
    "Anderson, type I": Anderson(kind="I"),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "GMRES": GMRES(),
}
EXACT: dict[str, Backward] = {
    f"ImplicitDifferentiation, {name}": ImplicitDifferentiation(solver=solver, stopping=ADJOINT)
    for name, solver in SOLVERS.items()
}


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
        step = self.damping * transposed + (1 - self.damping) * torch.eye(len(g), dtype=g.dtype)
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
COSINES = ("JFB", *(name for name in CHEAP if "neumann" in name))  # both forms give the same direction


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
class Case:
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


def draw(seed: int, radius: float | None = None) -> Case:
    """The case of this seed: with a Jacobian of random norm below 0.9, or of the given spectral radius.

    The radius is the factor by which Picard shrinks a residual in the long run.
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
    return Case(
        name=f"{kind}{', pytree' * is_tree}, state {tuple(solution.shape)}, seed {seed}",
        update=update,
        leaves=tuple(leaf.requires_grad_() for leaf in (x, *weights)),
        scale=scale,
        solution=solution,
        # From elsewhere an iteration of a given radius, but of any norm, need not arrive.
        start=solution + 1e-2 * normal(*solution.shape) if radius is None else solution,
        g=normal(*solution.shape),
        is_tree=is_tree,
    )


def _jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """J (N, N) of all samples as one vector."""
    found: Tensor = torch.autograd.functional.jacobian(lambda v: f(v.view_as(z)).flatten(), z.flatten())
    return found.detach()


def exact(transposed: Tensor, g: Tensor) -> Tensor:
    """u = (I - J^T)^{-1} g."""
    return torch.linalg.solve(torch.eye(len(g), dtype=g.dtype) - transposed, g)


def reference(case: Case, adjoint: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All gradients in one vector, given what `adjoint(J^T, g)` says u is."""
    transposed = _jacobian(case.f, case.solution).T
    u = adjoint(transposed, case.g.flatten()).view_as(case.solution)
    return _joined(torch.autograd.grad(case.f(case.solution), case.leaves, u))


def gradients(case: Case, mode: Backward) -> Tensor:
    """All gradients in one vector, by deqlib."""
    solution = fixed_point(
        lambda z: case.cut(case.f(case.joined(z))),
        case.cut(case.start),
        solver=Picard(),
        stopping=FORWARD,
        backward=mode,
        on_failure="ignore",
    )
    return _joined(torch.autograd.grad(case.joined(solution.value), case.leaves, case.g))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, infinite if it is not a number."""
    error = float((found - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def measure(cases: int, cosine_cases: int = COSINE_CASES) -> dict[str, Any]:
    """Worst errors by mode with the case of each, and cosines to the exact gradient by spectral radius."""
    worst: dict[str, tuple[float, str]] = dict.fromkeys([*EXACT, *CHEAP], (0.0, "every case"))
    for seed in track(range(cases), "accuracy"):
        case = draw(seed)
        expected = reference(case, exact)
        errors = {name: relative_error(gradients(case, mode), expected) for name, mode in EXACT.items()}
        for name, series in CHEAP.items():
            closed = reference(case, series.adjoint)
            errors[name] = relative_error(gradients(case, series.mode), closed)
        worst = {name: max(worst[name], (error, case.name)) for name, error in errors.items()}
    return {
        "cases": cases,
        "errors": {name: {"worst": error, "case": case} for name, (error, case) in worst.items()},
        "cosines": {name: _cosines(name, cosine_cases) for name in COSINES},
    }


def _cosines(name: str, cases: int) -> dict[str, dict[str, float]]:
    """Median and least cosine to the exact gradient, by spectral radius of J."""
    found = {}
    for factor in FACTORS:
        values = []
        for seed in range(cases):
            case = draw(seed, factor)
            cheap, right = gradients(case, CHEAP[name].mode), reference(case, exact)
            values.append(float(torch.nn.functional.cosine_similarity(cheap, right, dim=0)))
        if values:
            found[f"{factor}"] = {"median": statistics.median(values), "least": min(values)}
    return found


def bars(found: dict[str, Any]) -> list[Bar]:
    """One a mode; NaN where no case was run."""
    return [
        Bar(
            f"{name}: error {'to the dense gradient' if name in EXACT else 'to the dense series'}, worst",
            row["worst"] if found["cases"] else math.nan,
            EXACT_LIMIT if name in EXACT else SERIES_LIMIT,
            row["case"],
        )
        for name, row in found["errors"].items()
    ]


def table(found: dict[str, Any]) -> Table:
    """Cosines of the cheap modes."""
    shown = Table(title="cosine to the exact gradient, median (least), by spectral radius of J")
    shown.add_column("mode")
    for factor in FACTORS:
        shown.add_column(f"{factor}", justify="right")
    for name, row in found["cosines"].items():
        cells = [
            f"{row[f'{f}']['median']:.3f} ({row[f'{f}']['least']:.2f})" if f"{f}" in row else "-"
            for f in FACTORS
        ]
        shown.add_row(name.replace(", neumann", ""), *cells)
    return shown

"""Exact modes against the dense gradient, cheap ones against the series that they should sum."""

from __future__ import annotations

import math
from collections.abc import Iterator

from matplotlib.axes import Axes

from deqlib import (
    GMRES,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    NewtonKrylov,
    Picard,
    Solver,
    Stopping,
)

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...rows import grouped, having
from ...show import COLORS
from .random_maps import CHEAP, draw, exact, gradients, reference, relative_error

# By what the modes are compared with: the largest relative error they may have.
LIMITS = {"gradient": 1e-6, "series": 1e-10}
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


def build(run: Run, first_seed: int, count: int) -> Iterator[Row]:
    """Worst error of every mode over the problems of these seeds; None if one is not finite."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}

    def note(name: str, dense: str, error: float, problem: str) -> None:
        worst[name, dense] = max(worst.get((name, dense), (-1.0, "")), (error, problem))

    for seed in range(first_seed, first_seed + count):
        problem = draw(seed, device=run.device)
        right = reference(problem, exact)
        for name, mode in EXACT.items():
            note(name, "gradient", relative_error(gradients(problem, mode), right), problem.name)
        for name, series in CHEAP.items():
            right = reference(problem, series.adjoint)
            note(name, "series", relative_error(gradients(problem, series.mode), right), problem.name)
    for (name, dense), (error, where) in worst.items():
        figure = error if math.isfinite(error) else None
        yield {"contender": name, "dense": dense, "worst_error": figure, "problem": where}


def _worst(rows: list[Row]) -> tuple[float, str]:
    return max(
        (math.inf if row["worst_error"] is None else row["worst_error"], row["problem"]) for row in rows
    )


def bars(rows: list[Row]) -> list[Bar]:
    """One a mode."""
    found = []
    for chunks in grouped(rows, "contender", "dense"):
        name, dense = chunks[0]["contender"], chunks[0]["dense"]
        error, problem = _worst(chunks)
        title = f"{name}: error to the dense {dense}, worst of {_count(chunks)}"
        found.append(Bar(title, error, LIMITS[dense], problem))
    return found


def _count(chunks: list[Row]) -> int:
    return sum(row["count"] for row in chunks)


def table(rows: list[Row]) -> Table:
    """One line a mode."""
    lines = []
    for chunks in grouped(rows, "contender", "dense"):
        error, problem = _worst(chunks)
        names = (chunks[0]["contender"], chunks[0]["dense"])
        lines.append((*names, str(_count(chunks)), f"{error:.1e}", problem))
    head = ("mode", "dense", "problems", "worst error", "of")
    return Table("relative error to dense linear algebra in float64", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """A dot a chunk; the line is the bar."""
    for axis, (dense, limit) in zip(axes, LIMITS.items(), strict=True):
        found = [row for row in having(rows, dense=dense) if row["worst_error"] is not None]
        axis.scatter(
            [row["worst_error"] for row in found], [row["contender"] for row in found], color=COLORS[0], s=16
        )
        axis.axvline(limit, color=COLORS[1], linewidth=1)
        axis.set(xscale="log", xlabel="relative error, worst of a chunk of problems")
        axis.invert_yaxis()
        axis.tick_params("y", labelsize=8)


CASE = Case(
    "accuracy",
    "random small problems: exact modes against the dense gradient, cheap ones against their series",
    build,
    grid=product(first_seed=range(0, 300, 25), count=[25]),
    quick=product(first_seed=[0, 2], count=[2]),
    # Rounding errors differ with every change of the order of operations.
    metrics={"worst_error": Metric(noisy=True), "problem": Metric(better=None)},
    table=table,
    bars=bars,
    picture=Picture(
        _paint, lambda rows: [f"error to the dense {dense}" for dense in LIMITS], size=(6.5, 3.2)
    ),
)

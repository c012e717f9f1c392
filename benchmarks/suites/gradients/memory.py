"""Bytes that autograd saves for the backward pass: they must not grow with the steps of the solve."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from torch import Tensor

from deqlib import (
    JFB,
    Backward,
    ImplicitDifferentiation,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    Solver,
    Stopping,
    fixed_point,
)
from deqlib.diagnostics import saved_bytes
from deqlib.testing import mlp

from ...report import Bar

STEPS = (10, 1000)
MODES: dict[str, tuple[Backward, Solver]] = {
    "JFB": (JFB(), Picard()),
    "PhantomGradient, 5 steps": (PhantomGradient(steps=5), Picard()),
    "PhantomGradient, Neumann": (PhantomGradient(steps=5, form="neumann"), Picard()),
    "ImplicitDifferentiation": (ImplicitDifferentiation(), Picard()),
    "Reversible": (Reversible(), ReversiblePicard()),
}


def measure(batch: int = 8, width: int = 64, steps: tuple[int, int] = STEPS) -> dict[str, dict[int, int]]:
    """Bytes saved, by mode and number of steps; the cell's inputs and weights do not count."""
    problem = mlp(batch=batch, tokens=4, width=width, gain=1.0)
    inputs = tuple(x.detach().clone().requires_grad_() for x in problem.inputs)

    def solve(mode: Backward, solver: Solver, count: int) -> Tensor:
        value: Tensor = fixed_point(
            problem.cell, problem.z0, inputs, solver=solver, stopping=Stopping.steps(count), backward=mode
        ).value
        return value

    return {
        name: {
            count: saved_bytes(
                lambda mode=mode, solver=solver, n=count: solve(mode, solver, n), exclude=inputs
            )
            for count in steps
        }
        for name, (mode, solver) in MODES.items()
    }


def bars(rows: dict[str, dict[int, int]]) -> list[Bar]:
    """The same number of bytes, whatever the number of steps."""
    found = []
    for name, sizes in rows.items():
        (few, least), (many, most) = min(sizes.items()), max(sizes.items())
        # Fewer bytes would be as odd as more.
        value = max(most / least, least / most) if least and most else math.inf
        note = f"{least / 1e3:,.0f} kB"
        found.append(Bar(f"{name}: bytes saved for backward, {many} / {few} steps", value, 1.0, note))
    return found


def table(rows: dict[str, dict[int, int]]) -> Table:
    """One line a mode."""
    shown = Table(title="kB saved for backward")
    shown.add_column("mode")
    for count in next(iter(rows.values())):
        shown.add_column(f"{count} steps", justify="right")
    for name, sizes in rows.items():
        shown.add_row(name, *(f"{size / 1e3:,.1f}" for size in sizes.values()))
    return shown


def record(rows: dict[str, dict[int, int]]) -> dict[str, Any]:
    """For JSON."""
    return {name: {str(count): size for count, size in sizes.items()} for name, sizes in rows.items()}

"""Bytes that autograd keeps for the backward pass, by mode and number of steps.

They are counted, not timed, so every machine gives the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from matplotlib.axes import Axes
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
    fixed_point,
)
from deqlib.diagnostics import saved_bytes
from deqlib.testing import Problem, mlp

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...peers import torchdeq
from ...show import COLORS

Contender = Callable[[Problem, int], Tensor]  # problem, steps -> the value with its graph


def _ours(mode: Backward, solver: Solver, problem: Problem, steps: int) -> Tensor:
    if isinstance(mode, StochasticJFB):  # it draws its steps itself: so many without gradient
        mode = StochasticJFB(no_grad=(steps, steps), grad=mode.grad)
    value: Tensor = fixed_point(
        problem.cell,
        problem.z0,
        problem.inputs,
        solver=solver,
        stopping=Stopping.steps(steps),
        backward=mode,
    ).value
    return value


def _theirs(settings: dict[str, object], problem: Problem, steps: int) -> Tensor:
    deq = torchdeq.get_deq(f_max_iter=steps, f_tol=0.0, f_stop_mode="rel", **settings)
    values, _ = deq(problem.f, problem.z0)
    value: Tensor = values[-1]
    return value


GROWING: dict[str, Contender] = {
    "Unroll": partial(_ours, Unroll(), Picard()),
    "Unroll, checkpoint": partial(_ours, Unroll(checkpoint=True), Picard()),
}
CONSTANT: dict[str, Contender] = {
    "PhantomGradient, 5 steps": partial(_ours, PhantomGradient(steps=5), Picard()),
    "PhantomGradient, Neumann": partial(_ours, PhantomGradient(steps=5, form="neumann"), Picard()),
    "StochasticJFB, 5 steps": partial(_ours, StochasticJFB(grad=(5, 5)), Picard()),
    "JFB": partial(_ours, JFB(), Picard()),
    "ImplicitDifferentiation": partial(_ours, ImplicitDifferentiation(), Picard()),
    "Reversible": partial(_ours, Reversible(), ReversiblePicard()),
}
# Grows with the history of the forward solve until that is full.
BOUNDED: dict[str, Contender] = {
    "SharedInverse, memory 5": partial(_ours, SharedInverse(), Broyden(memory=5)),
}
PEERS: dict[str, Contender] = {
    "torchdeq ift": partial(_theirs, {"ift": True}),
    "torchdeq hook_ift": partial(_theirs, {"hook_ift": True}),
    "torchdeq grad=1": partial(_theirs, {"grad": 1}),
    "torchdeq grad=5, tau=0.5": partial(_theirs, {"grad": 5, "tau": 0.5}),
}


def build(run: Run, batch: int, width: int, steps: int) -> Iterator[Row]:
    """Bytes of every mode; the cell's inputs and weights do not count."""
    problem = mlp(batch=batch, tokens=1, width=width, gain=1.0).to(device=run.device)
    inputs = tuple(x.detach().requires_grad_() for x in problem.inputs)
    problem = Problem(problem.name, problem.cell, problem.z0, inputs, None)
    for name, contender in {**GROWING, **CONSTANT, **BOUNDED, **PEERS}.items():
        size = saved_bytes(partial(contender, problem, steps), exclude=inputs)
        yield {"contender": name, "constant": name in CONSTANT, "saved_bytes": size}


def bars(rows: list[Row]) -> list[Bar]:
    """The same number of bytes, whatever the number of steps, of modes that promise it."""
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows if row["constant"]):
        sizes = {row["steps"]: row["saved_bytes"] for row in rows if row["contender"] == name}
        least, most = min(sizes.values()), max(sizes.values())
        # Fewer bytes would be as odd as more, and so would be none.
        value = most / least if least else math.inf
        title = f"{name}: bytes saved for backward, {max(sizes)} / {min(sizes)} steps"
        found.append(Bar(title, value if len(sizes) > 1 else math.nan, 1.0, f"{least / 1e3:,.1f} kB"))
    return found


def table(rows: list[Row]) -> Table:
    """One line a mode."""
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        sizes = {row["steps"]: row["saved_bytes"] for row in rows if row["contender"] == name}
        lines.append((name, *(f"{sizes[n] / 1e3:,.1f}" if n in sizes else "-" for n in steps)))
    return Table("kB saved for backward, by steps of the solve", ("mode", *map(str, steps)), lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Modes that keep the same share a line."""
    (axis,) = axes
    lines: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in dict.fromkeys(row["contender"] for row in rows):
        sizes = [(row["steps"], row["saved_bytes"]) for row in rows if row["contender"] == name]
        lines.setdefault(tuple(sizes), []).append(name)
    for (points, names), color in zip(lines.items(), COLORS * len(lines), strict=False):
        axis.plot(*zip(*points, strict=True), "o-", color=color, label="\n".join(names))
    axis.set(xscale="log", yscale="log", xlabel="steps of the solve", ylabel="bytes saved for backward")
    axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), labelspacing=1)


CASE = Case(
    "memory",
    "bytes that autograd keeps for the backward pass, by mode and steps of the solve",
    build,
    grid=product(batch=[32], width=[256], steps=[1, 10, 100, 1000]),
    quick=product(batch=[4], width=[32], steps=[1, 10, 100]),
    metrics={"saved_bytes": Metric()},
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("memory",), size=(6.5, 4.2)),
)

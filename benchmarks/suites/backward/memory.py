"""Bytes that autograd keeps for the backward pass, by mode and number of steps.

They are counted, not timed, so every machine gives the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from deqlib import Broyden, Picard, SharedInverse, StochasticJFB, Stopping
from deqlib.diagnostics import saved_bytes
from deqlib.testing import Problem, mlp

from ...baselines import torchdeq
from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...rows import distinct, having
from ...show import COLORS, pivot
from .contenders import MODES, PEERS, solved, trained

Contender = Callable[[Problem, int], Tensor]  # problem, steps -> the value with its graph


def _mode(name: str, problem: Problem, steps: int) -> Tensor:
    return solved(*MODES[name], problem, Stopping.steps(steps))


def _stochastic(problem: Problem, steps: int) -> Tensor:
    """It draws its steps itself: so many without gradient, and 5 with it."""
    mode = StochasticJFB(no_grad=(steps, steps), grad=(5, 5))
    return solved(mode, Picard(), problem, Stopping.steps(steps))


def _shared_inverse(problem: Problem, steps: int) -> Tensor:
    return solved(SharedInverse(), Broyden(memory=5), problem, Stopping.steps(steps))


def _peer(settings: dict[str, Any], problem: Problem, steps: int) -> Tensor:
    return torchdeq.layer({"f_max_iter": steps, "f_tol": 0.0, **settings}, problem)


GROWING: dict[str, Contender] = {name: partial(_mode, name) for name in ("Unroll", "Unroll, checkpoint")}
CONSTANT: dict[str, Contender] = {
    "PhantomGradient, 5 steps": partial(_mode, "PhantomGradient, 5 steps"),
    "PhantomGradient, Neumann": partial(_mode, "PhantomGradient, Neumann"),
    "StochasticJFB, 5 steps": _stochastic,
    "JFB": partial(_mode, "JFB"),
    "ImplicitDifferentiation": partial(_mode, "ImplicitDifferentiation"),
    "Reversible": partial(_mode, "Reversible"),
}
# Grows with the history of the forward solve until that is full.
BOUNDED: dict[str, Contender] = {"SharedInverse, memory 5": _shared_inverse}
THEIRS: dict[str, Contender] = {name: partial(_peer, settings) for name, settings in PEERS.items()}


def build(run: Run, batch: int, width: int, steps: int) -> Iterator[Row]:
    """Bytes of every mode; the cell's inputs and weights do not count."""
    problem = trained(mlp(batch=batch, tokens=1, width=width, gain=1.0).to(device=run.device))
    for name, contender in {**GROWING, **CONSTANT, **BOUNDED, **THEIRS}.items():
        size = saved_bytes(partial(contender, problem, steps), exclude=problem.inputs)
        yield {"contender": name, "constant": name in CONSTANT, "saved_bytes": size}


def bars(rows: list[Row]) -> list[Bar]:
    """The same number of bytes, whatever the number of steps, of modes that promise it."""
    found = []
    for name in distinct(having(rows, constant=True), "contender"):
        sizes = {row["steps"]: row["saved_bytes"] for row in having(rows, contender=name)}
        least, most = min(sizes.values()), max(sizes.values())
        # Fewer bytes would be as odd as more, and so would be none.
        value = most / least if least else math.inf
        title = f"{name}: bytes saved for backward, {max(sizes)} / {min(sizes)} steps"
        found.append(Bar(title, value if len(sizes) > 1 else math.nan, 1.0, f"{least / 1e3:,.1f} kB"))
    return found


def table(rows: list[Row]) -> Table:
    """One line a mode."""
    title = "kB saved for backward, by steps of the solve"
    return pivot(title, rows, "mode", "contender", "steps", lambda row: f"{row['saved_bytes'] / 1e3:,.1f}")


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Modes that keep the same share a line."""
    (axis,) = axes
    lines: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name in distinct(rows, "contender"):
        sizes = [(row["steps"], row["saved_bytes"]) for row in having(rows, contender=name)]
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

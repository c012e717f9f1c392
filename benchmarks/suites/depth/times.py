"""Seconds of a training step, by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from matplotlib.axes import Axes

from deqlib import ImplicitLayer, Picard, Stopping

from ...case import COUNT, SECONDS, Case, Picture, Row, Run, Table, product
from ...measure import interleaved, marked, milliseconds
from .cells import Block
from .contenders import CONTENDERS, parameters
from .memory import model_and_input, step
from .show import by_depth, plot_by_depth


def build(run: Run, depth: int, batch: int, tokens: int, width: int) -> Iterator[Row]:
    """Seconds of every contender, in turns."""
    pairs = {
        name: model_and_input(name, run.device, depth=depth, batch=batch, tokens=tokens, width=width)
        for name in CONTENDERS
    }
    times = interleaved({name: partial(step, *pair) for name, pair in pairs.items()}, run.rounds)
    for name, (model, _) in pairs.items():
        yield {"contender": name, "seconds": times[name], "parameters": parameters(model)}


def _profiled(run: Run, depth: int, batch: int, tokens: int, width: int) -> Callable[[], object]:
    """The forward pass of an implicit layer."""
    torch.manual_seed(0)
    cell = Block(width).to(run.device)
    layer = ImplicitLayer(marked(cell), solver=Picard(), stopping=Stopping.steps(depth))
    x = torch.randn(batch, tokens, width).to(run.device)
    return torch.no_grad()(partial(layer, x))


def _table(rows: list[Row]) -> Table:
    return by_depth(rows, "ms of a training step", lambda row: milliseconds(row["seconds"]))


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    plot_by_depth(axes[0], rows, "seconds")
    plot_by_depth(axes[1], rows, "parameters")
    for axis in axes:
        axis.set(yscale="log")
    axes[0].legend(frameon=False, fontsize=7)


CASE = Case(
    "time",
    "seconds of a training step against depth, transformer block",
    build,
    grid=product(depth=(1, 2, 4, 8, 16, 32, 64), batch=(8,), tokens=(64,), width=(256,)),
    quick=product(depth=(1, 4, 16), batch=(4,), tokens=(16,), width=(32,)),
    metrics={"seconds": SECONDS, "parameters": COUNT},
    table=_table,
    picture=Picture(_paint, lambda rows: ("seconds of a training step", "parameters"), size=(5.0, 4.0)),
    solve=_profiled,
)

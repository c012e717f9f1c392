"""What a training step keeps and takes, by depth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from deqlib.diagnostics import saved_bytes

from ...case import COUNT, Bar, Case, Metric, Picture, Row, Run, Settings, Table, product
from ...measure import peak_bytes, peak_rss
from ...rows import distinct, having
from .cells import Block
from .contenders import CONTENDERS, EXPLICIT, IMPLICIT, parameters
from .show import by_depth, plot_by_depth

FLAT, LINEAR = 1.02, 0.02
FROM = {"saved_bytes": 1, "peak_bytes": 2}  # an adjoint of a single step holds one state less than of more
RESIDENT = (1, 16, 64)  # depths at which a process of its own is started as well


def build(run: Run, depth: int, batch: int, tokens: int, width: int, resident: bool) -> Iterator[Row]:
    """Bytes of every contender."""
    sizes: Settings = {"depth": depth, "batch": batch, "tokens": tokens, "width": width}
    own: tuple[str, ...] = ()  # who gets a process, which takes seconds to start
    if resident and run.device.type == "cpu":
        own = (EXPLICIT[1], IMPLICIT[0]) if run.quick else tuple(CONTENDERS)
    for name in CONTENDERS:
        model, x = model_and_input(name, run.device, **sizes)
        work = partial(step, model, x)
        work()  # what libraries keep for good on a GPU is not the step's
        yield {
            "contender": name,
            "parameters": parameters(model),
            "saved_bytes": saved_bytes(partial(model, x), exclude=[*model.parameters(), x]),
            "peak_bytes": peak_bytes(work, run.device),
            "resident_bytes": peak_rss(make, contender=name, **sizes) if name in own else None,
        }


def model_and_input(
    contender: str, device: torch.device, *, depth: int, batch: int, tokens: int, width: int
) -> tuple[nn.Module, Tensor]:
    """A stack of blocks, or an implicit layer of one, and random tokens that ask for their gradient."""
    torch.manual_seed(0)
    model = CONTENDERS[contender](partial(Block, width), depth).to(device)
    x = torch.randn(batch, tokens, width).to(device).requires_grad_()
    return model, x


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward, all gradients in memory at the end."""
    torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])


def make(contender: str, depth: int, batch: int, tokens: int, width: int) -> Callable[[], None]:
    """A training step on the CPU, for a process of its own."""
    device = torch.device("cpu")
    small, x = model_and_input(contender, device, depth=1, batch=1, tokens=tokens, width=width)
    step(small, x)  # libraries and threads are not the step's
    return partial(
        step, *model_and_input(contender, device, depth=depth, batch=batch, tokens=tokens, width=width)
    )


def bars(rows: list[Row]) -> list[Bar]:
    """Implicit layers flat, explicit depth straight; the worst contender decides."""
    found = []
    for metric, what in (("saved_bytes", "saved for backward"), ("peak_bytes", "peak of a training step")):
        judged = [row for row in rows if row["depth"] >= FROM[metric]]
        growth = {name: _growth(_by_depth(judged, name, metric)) for name in IMPLICIT}
        found.append(_bar(f"implicit layers, {what}, most / least over", judged, growth, FLAT))
    bend = {name: _bend(_by_depth(rows, name, "saved_bytes")) for name in EXPLICIT}
    found.append(_bar("explicit depth, saved for backward, off a straight line over", rows, bend, LINEAR))
    return found


def _bar(what: str, rows: list[Row], values: dict[str, float], limit: float) -> Bar:
    """NaN if any value is."""
    depths = sorted(distinct(rows, "depth"))
    span = f"depth {depths[0]} to {depths[-1]}" if depths else "no depth"
    worst = math.nan if any(map(math.isnan, values.values())) else max(values.values())
    note = "; ".join(f"{name} {value:.4g}" for name, value in values.items())
    return Bar(f"memory: {what} {span}", worst, limit, note)


def _by_depth(rows: list[Row], contender: str, metric: str) -> dict[int, int]:
    return {row["depth"]: row[metric] for row in having(rows, contender=contender)}


def _growth(sizes: dict[int, int]) -> float:
    """Most over least; NaN of fewer than two depths."""
    return max(sizes.values()) / min(sizes.values()) if len(sizes) > 1 else math.nan


def _bend(sizes: dict[int, int]) -> float:
    """Largest distance from the least-squares line, relative to the size; NaN of fewer than three depths."""
    if len(sizes) < 3:
        return math.nan
    line = statistics.linear_regression(list(sizes), list(sizes.values()))
    return max(abs(line.slope * depth + line.intercept - size) / size for depth, size in sizes.items())


def _table(rows: list[Row]) -> Table:
    def cell(row: Row) -> str:
        figures = [row["saved_bytes"], row["peak_bytes"], row["resident_bytes"]]
        return " / ".join(f"{figure / 1e6:,.4g}" for figure in figures if figure is not None)

    return by_depth(rows, "MB saved for backward / peak of a training step / resident in a process", cell)


def _megabytes(metric: str, row: Row) -> float | None:
    return None if row[metric] is None else row[metric] / 1e6


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, metric in zip(axes, ("saved_bytes", "peak_bytes", "resident_bytes"), strict=False):
        plot_by_depth(axis, rows, partial(_megabytes, metric))
        axis.set(yscale="log", ylabel="MB")
    axes[0].legend(frameon=False, fontsize=7)


def _panels(rows: list[Row]) -> tuple[str, ...]:
    measured = any(row["resident_bytes"] is not None for row in rows)
    return ("saved for backward", "peak of a training step", "resident, a process of its own")[: 2 + measured]


CASE = Case(
    "memory",
    "bytes of a training step against depth, transformer block",
    build,
    grid=[
        {**point, "resident": point["depth"] in RESIDENT}
        for point in product(depth=(1, 2, 4, 8, 16, 32, 64), batch=(32,), tokens=(64,), width=(256,))
    ],
    quick=[
        {**point, "resident": point["depth"] == 8}
        for point in product(depth=(1, 4, 8), batch=(4,), tokens=(16,), width=(32,))
    ],
    metrics={
        "parameters": COUNT,
        "saved_bytes": COUNT,
        "peak_bytes": COUNT,
        "resident_bytes": Metric(noisy=True),
    },
    table=_table,
    bars=bars,
    picture=Picture(_paint, _panels, columns=3, size=(5.0, 4.2)),
)

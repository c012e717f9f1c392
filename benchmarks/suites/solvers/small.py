"""Where the bookkeeping weighs most: a cell of a fraction of a millisecond, and samples of one number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from deqlib import Auto, ImplicitLayer, Solution, Status, fixed_point
from deqlib.counting import CountedCell

from ...case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product
from ...measure import interleaved, milliseconds, peak_bytes, ratio
from ...rows import by_contender, figure, grouped, having
from ...show import COLORS, listing

LAYER, NUMBERS = "layer", "numbers"
SOLVED, BARE = "default", "bare loop"
REPEATS = 4  # rounds for each that is asked for: these solves are short
LIMIT = 2.0  # times the bare loop
SECONDS_LIMIT, STATES_LIMIT = 1.0, 10.0


class Cell(nn.Module):
    """f(z) = tanh(W z + x), W orthogonal times 0.8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return torch.tanh(self.linear(z) + x)


def build(run: Run, what: str, batch: int, width: int) -> Iterator[Row]:
    """A training step of a layer at its defaults beside a bare one; or a solve of numbers, and its memory."""
    return _layer(run, batch, width) if what == LAYER else _numbers(run, batch, width)


def _layer(run: Run, batch: int, width: int) -> Iterator[Row]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell, x = Cell(width).to(run.device), torch.randn(batch, width).to(run.device)
    layer = ImplicitLayer(cell)
    with torch.no_grad():
        evaluations = layer.solve(x).nfe
    products = _products(layer, x)

    def bare() -> None:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(evaluations):
                z = cell(z, x)
        start = z.requires_grad_()
        image = cell(start, x)
        u = ones = torch.ones_like(x)
        for _ in range(products):
            u = torch.autograd.grad(image, start, u, retain_graph=True)[0] + ones
        image.backward(u)

    contenders: dict[str, Callable[[], object]] = {
        SOLVED: lambda: layer(x).sum().backward(),
        BARE: bare,
    }
    times = interleaved(contenders, run.rounds if run.quick else REPEATS * run.rounds)
    for name in contenders:
        yield {
            "contender": name,
            "evaluations": evaluations + 1,
            "products": products,
            "seconds": times[name],
            "states": None,
            "converged": None,
        }


def _products(layer: ImplicitLayer, x: Tensor) -> int:
    """Products with J^T of the adjoint solve."""
    cell = CountedCell(layer.cell)
    ImplicitLayer(cell)(x).sum().backward()
    return cell.products - 1  # the last one is for the parameters


def _numbers(run: Run, batch: int, width: int) -> Iterator[Row]:
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0)).to(run.device)
    z0 = torch.zeros_like(x)

    @torch.no_grad()
    def solve() -> Solution:
        return fixed_point(lambda z: torch.tanh(0.9 * z + x), z0, solver=Auto(), on_failure="ignore")

    found = solve()
    times = interleaved({SOLVED: solve}, run.rounds)
    yield {
        "contender": SOLVED,
        "evaluations": found.nfe,
        "products": None,
        "seconds": times[SOLVED],
        "states": peak_bytes(solve, run.device) / z0.nbytes,
        "converged": int((found.status == Status.CONVERGED).sum()),
    }


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Time of the default over that of the bare loop, by size."""
    found = {}
    for point in grouped(having(rows, what=LAYER), "batch", "width"):
        times = {name: row["seconds"] for name, row in by_contender(point).items()}
        found[f"{point[0]['batch']} x {point[0]['width']}"] = ratio(times[SOLVED], times[BARE])
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """The layer beside its bare loop; time and memory of the many numbers."""
    found = [
        Bar(f"training step of a {size} layer at its defaults / bare loop, time", value, LIMIT)
        for size, value in _ratios(rows).items()
    ]
    for row in having(rows, what=NUMBERS):
        name = f"{row['batch']:,} samples of {row['width']} number, Auto"
        found.append(Bar(f"{name}, seconds", statistics.median(row["seconds"]), SECONDS_LIMIT))
        found.append(Bar(f"{name}, peak memory in states", round(row["states"], 1), STATES_LIMIT))
    return found


def table(rows: list[Row]) -> Table:
    """One line a contender."""
    return listing(
        "defaults where the bookkeeping weighs most",
        rows,
        {
            "what": lambda row: f"{row['what']} {row['batch']:,} x {row['width']}",
            "contender": lambda row: row["contender"],
            "evaluations": lambda row: str(row["evaluations"]),
            "products": lambda row: "-" if row["products"] is None else str(row["products"]),
            "ms": lambda row: milliseconds(row["seconds"]),
            "peak, states": lambda row: "-" if row["states"] is None else f"{row['states']:.1f}",
        },
    )


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    names = [f"{row['what']}, {row['contender']}" for row in rows]
    axes[0].barh(names, [(figure(row["seconds"]) or math.nan) * 1e3 for row in rows], color=COLORS[0])
    axes[0].set(xlabel="ms", xscale="log")
    axes[0].invert_yaxis()


CASE = Case(
    "small",
    "a layer at its defaults on a cheap cell beside a bare loop, and many samples of one number",
    build,
    grid=[
        *product(what=[LAYER], batch=[512], width=[64]),
        *product(what=[NUMBERS], batch=[200_000], width=[1]),
    ],
    quick=[
        *product(what=[LAYER], batch=[64], width=[64]),
        *product(what=[NUMBERS], batch=[20_000], width=[1]),
    ],
    metrics={
        "evaluations": COUNT,
        "products": COUNT,
        "seconds": SECONDS,
        "states": Metric(),
        "converged": Metric("higher"),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ["a solve, or a training step"], size=(7.0, 2.2)),
)

"""Peak memory of an Anderson solve beyond its problem, in states."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes

from deqlib import Anderson, Solution, Stopping, fixed_point

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...maps import elementwise
from ...measure import peak_bytes
from ...show import COLORS, curve, listing


def limit(memory: int) -> int:
    """States that Anderson may hold: its columns, half of them again while room is made, and four more."""
    return 2 * memory + memory // 2 + 4


def build(run: Run, memory: int, batch: int, width: int) -> list[Row]:
    """Peak of a solve in states, and whether it went through all that costs memory.

    Samples finish at different steps, the history wraps round, and some iterates are worse than the best one.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator)
    # The spectrum of every sample is its own: the wider, the more steps. It reaches beyond -1, where
    # residuals may grow.
    spread = torch.linspace(0.3, 1, batch).unsqueeze(1)
    rates = spread * (3 * torch.rand(batch, width, generator=generator) - 2.1)
    x, rates = x.to(run.device), rates.to(run.device)
    z0 = torch.zeros_like(x)

    def solve() -> Solution:
        return fixed_point(
            elementwise,
            z0,
            (x, rates),
            solver=Anderson(memory=memory),
            stopping=Stopping(rtol=1e-6, max_steps=10 * memory, patience=None),
            on_failure="ignore",
        )

    with torch.no_grad():
        solution = solve()  # what libraries allocate once is no solve's
        peak = peak_bytes(solve, run.device)
    assert solution.trace is not None
    return [
        {
            "contender": "Anderson",
            "peak_bytes": peak,
            "states": peak / z0.nbytes,
            "fewest_steps": int(solution.num_steps.min()),
            "most_steps": int(solution.num_steps.max()),
            "worse_iterates": int((solution.trace[1:] > solution.trace.cummin(0).values[:-1]).sum()),
        }
    ]


def bars(rows: list[Row]) -> list[Bar]:
    """One a memory."""
    return [
        Bar(
            f"Anderson, memory {row['memory']}: peak in states",
            round(row["states"], 1),  # a trace and a few numbers a sample are no state
            limit(row["memory"]),
            f"steps {row['fewest_steps']} to {row['most_steps']}, "
            f"{row['worse_iterates']} iterates worse than the best",
        )
        for row in rows
    ]


def table(rows: list[Row]) -> Table:
    """One line a memory."""
    return listing(
        "peak memory of an Anderson solve",
        rows,
        {
            "memory": lambda row: str(row["memory"]),
            "MB": lambda row: f"{row['peak_bytes'] / 1e6:.1f}",
            "states": lambda row: f"{row['states']:.2f}",
            "limit": lambda row: str(limit(row["memory"])),
        },
    )


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    curve(axis, rows, "memory", lambda row: limit(row["memory"]), "--", color=COLORS[6], label="2.5 k + 4")
    curve(axis, rows, "memory", "states", "o", color=COLORS[0], label="measured")
    axis.set(xlabel="memory k", ylabel="states", ylim=(0, 1.05 * max(row["states"] for row in rows)))
    axis.legend(frameon=False)


CASE = Case(
    "memory",
    "peak of an Anderson solve, in states",
    build,
    grid=product(memory=[2, 5, 8, 16], batch=[16], width=[65536]),
    quick=product(memory=[5, 8], batch=[16], width=[16384]),
    metrics={
        "peak_bytes": Metric(),
        "states": Metric(),
        "fewest_steps": Metric(better=None),
        "most_steps": Metric(better=None),
        "worse_iterates": Metric(better=None),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ["peak memory of an Anderson solve"]),
)

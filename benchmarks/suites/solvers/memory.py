"""Peak memory of an Anderson solve beyond its problem, in states."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from deqlib import Anderson, Solution, Stopping, fixed_point

from ...peak import peak_bytes
from ...report import Bar

MEMORIES = (5, 8)


def limit(memory: int) -> int:
    """States that Anderson may hold."""
    return 2 * memory + 4


def measure(
    batch: int = 16, width: int = 65536, memories: tuple[int, ...] = MEMORIES
) -> dict[int, dict[str, Any]]:
    """By memory k: peak of a solve in states, and whether it went through all that costs memory.

    The cell allocates its output and nothing else. Samples finish at different steps, the history wraps
    round, and some iterates are worse than the best one.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator)
    # The spectrum of every sample is its own: the wider, the more steps. It reaches beyond -1, where
    # residuals may grow.
    spread = torch.linspace(0.3, 1, batch).unsqueeze(1)
    rates = spread * (3 * torch.rand(batch, width, generator=generator) - 2.1)
    z0 = torch.zeros_like(x)
    rows = {}
    for memory in memories:
        solutions: list[Solution] = []

        def solve(memory: int = memory, solutions: list[Solution] = solutions) -> None:
            solutions.append(
                fixed_point(
                    _cell,
                    z0,
                    (x, rates),
                    solver=Anderson(memory=memory),
                    stopping=Stopping(rtol=1e-6, max_steps=10 * memory, patience=None),
                    on_failure="ignore",
                )
            )

        with torch.no_grad():
            peak = peak_bytes(solve)
        solution = solutions[0]
        assert solution.trace is not None
        rows[memory] = {
            "peak_bytes": peak,
            "states": peak / (z0.numel() * z0.element_size()),
            "steps": [int(solution.num_steps.min()), int(solution.num_steps.max())],
            "worse_iterates": int((solution.trace[1:] > solution.trace.cummin(0).values[:-1]).sum()),
        }
    return rows


def _cell(z: Tensor, x: Tensor, rates: Tensor) -> Tensor:
    return torch.addcmul(x, z, rates)


def bars(rows: dict[int, dict[str, Any]]) -> list[Bar]:
    """One a memory."""
    return [
        Bar(
            f"Anderson, memory {memory}: peak in states",
            round(row["states"], 1),  # a trace and a few numbers a sample are no state
            limit(memory),
            "steps {} to {}, ".format(*row["steps"])
            + f"{row['worse_iterates']} iterates worse than the best",
        )
        for memory, row in rows.items()
    ]


def table(rows: dict[int, dict[str, Any]]) -> Table:
    """One line a memory."""
    shown = Table(title="peak memory of an Anderson solve")
    for column in ("memory", "MB", "states", "limit"):
        shown.add_column(column, justify="right")
    for memory, row in rows.items():
        megabytes = f"{row['peak_bytes'] / 1e6:.1f}"
        shown.add_row(str(memory), megabytes, f"{row['states']:.2f}", str(limit(memory)))
    return shown

"""What training one layer keeps in memory, against its depth.

The same cell is stacked explicitly (as many evaluations on the tape as steps) and made implicit with each
backward mode. Bytes saved for the backward pass are counted, not timed, so the table is the same on every
machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from deqlib import (
    JFB,
    Backward,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Stopping,
    Unroll,
)
from deqlib.diagnostics import saved_bytes

MODES: dict[str, Backward] = {
    "explicit depth (Unroll)": Unroll(),
    "PhantomGradient, 5 steps": PhantomGradient(steps=5),
    "PhantomGradient, Neumann": PhantomGradient(steps=5, form="neumann"),
    "JFB": JFB(),
    "ImplicitDifferentiation": ImplicitDifferentiation(),
}


class Cell(nn.Module):
    """LayerNorm(x + W2 tanh(W1 z))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Next state, shape of `z`."""
        return self.norm(x + self.outer(torch.tanh(self.inner(z))))


def memory(steps: list[int], batch: int, width: int) -> dict[str, dict[int, int]]:
    """Bytes saved for backward, by mode and number of solver steps."""
    torch.manual_seed(0)
    cell, x = Cell(width), torch.randn(batch, width)
    return {
        name: {
            count: saved_bytes(
                lambda mode=mode, count=count: ImplicitLayer(
                    cell, solver=Picard(), backward=mode, stopping=Stopping.steps(count)
                )(x),
                exclude=cell.parameters(),
            )
            for count in steps
        }
        for name, mode in MODES.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the suite."""
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 100, 500], help="solver steps")
    parser.add_argument("--batch", type=int, default=32, help="samples")
    parser.add_argument("--width", type=int, default=256, help="numbers a sample")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks/memory.json"), help="where the figures go"
    )


def run(arguments: argparse.Namespace) -> None:
    """Count, print the table, write the JSON."""
    rows = memory(arguments.steps, arguments.batch, arguments.width)
    table = Table(title=f"kB saved for backward, batch {arguments.batch}, width {arguments.width}")
    table.add_column("mode")
    for count in arguments.steps:
        table.add_column(f"{count} steps", justify="right")
    for name, sizes in rows.items():
        table.add_row(name, *(f"{size / 1e3:,.0f}" for size in sizes.values()))
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"torch": torch.__version__, "saved_bytes": rows}, indent=2))

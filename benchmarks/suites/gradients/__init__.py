"""deqlib's gradients: time against torchdeq 0.1, accuracy against dense linear algebra, memory.

Parts:
  time      the implicit backward pass at one true residual of the adjoint, 1e-3 and 1e-6
  accuracy  random small problems: exact modes against the dense gradient, cheap ones against their series,
            and how far the cheap ones point from the exact gradient
  memory    bytes saved for the backward pass after 10 and after 1,000 steps

Each part prints its table; the bars are judged at the end. The exit code does not tell of them: a time
depends on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from deqlib.testing import Problem

from ...report import Measured, choose, measure_parts, terminal
from . import accuracy, memory, times

PARTS = ("time", "accuracy", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the suite."""
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that everybody is timed (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="of the problems of `time` only these")
    parser.add_argument("--cases", type=int, default=300, help="of `accuracy` (%(default)s)")
    parser.add_argument(
        "--cosine-cases",
        type=int,
        default=accuracy.COSINE_CASES,
        help="of `accuracy`, at each spectral radius (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/gradients.json"),
        help="where the figures go (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and the bars, write JSON."""
    problems, console = choose(times.cases(), arguments.problems), terminal()
    figures = measure_parts(arguments, _MEASURES, problems, console)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2, allow_nan=False))
    console.print(f"figures: {arguments.out}")


def _time(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    rows = times.measure(problems, arguments.rounds)
    return times.record(rows), times.bars(rows), times.table(rows)


def _accuracy(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    found = accuracy.measure(arguments.cases, arguments.cosine_cases)
    return found, accuracy.bars(found), accuracy.table(found)


def _memory(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    rows = memory.measure()
    return memory.record(rows), memory.bars(rows), memory.table(rows)


_MEASURES: dict[str, Callable[[list[Problem], argparse.Namespace], Measured]] = {
    "time": _time,
    "accuracy": _accuracy,
    "memory": _memory,
}

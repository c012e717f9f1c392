"""deqlib's solvers: evaluations, success, time and memory, against torchdeq 0.1 and against bare loops.

Parts:
  solves      evaluations, success and time on problems with known answers, to 1e-3 and 1e-5
  overhead    Picard against a bare loop of as many evaluations, on cells that take 2 ms and more
  compact     what it saves that finished samples leave the batch
  memory      peak of an Anderson solve, in states
  robustness  random small problems, hopeless ones among them: nothing may raise, hang or get worse

Each part prints its table; the bars are judged at the end. The exit code does not tell of them: a time
depends on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from deqlib.testing import Problem, suite

from ...plot import traces
from ...report import Measured, choose, measure_parts, terminal
from . import compact, memory, overhead, robustness, solves

PARTS = ("solves", "overhead", "compact", "memory", "robustness")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the suite."""
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that everybody is timed (%(default)s)")
    parser.add_argument(
        "--max-steps", type=int, default=300, help="evaluations allowed in a solve, less one (%(default)s)"
    )
    parser.add_argument(
        "--once",
        type=float,
        default=solves.ONCE,
        metavar="SECONDS",
        help="a solve that takes longer is timed once only (%(default)s)",
    )
    parser.add_argument(
        "--overhead-steps", type=int, default=30, help="most steps of a solve of `overhead` (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="of the problems only these")
    parser.add_argument("--cases", type=int, default=10_000, help="of `robustness` (%(default)s)")
    parser.add_argument("--seed-from", type=int, default=0, help="first seed of `robustness` (%(default)s)")
    parser.add_argument(
        "--largest-exponent",
        type=float,
        default=robustness.LARGEST_EXPONENT,
        help="of 10, in the scales of the states of `robustness` (%(default)s)",
    )
    parser.add_argument("--no-plot", action="store_true", help="leave out the picture of the residuals")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks/solvers.json"),
        help="where the figures go, and beside them the picture (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and the bars, write JSON and picture."""
    problems, console = choose(suite(), arguments.problems), terminal()
    figures = measure_parts(arguments, _MEASURES, problems, console)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=2))
    console.print(f"figures: {arguments.out}")
    if "solves" in arguments.part and not arguments.no_plot:
        picture = arguments.out.with_suffix(".png")
        traces(problems, min(solves.TOLERANCES), arguments.max_steps + 1, picture)
        console.print(f"residuals: {picture}")


def _solves(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    rows = solves.measure(problems, arguments.rounds, arguments.max_steps, arguments.once)
    return solves.record(rows), solves.bars(rows, arguments.max_steps), solves.table(rows)


def _overhead(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    rows = overhead.measure(problems, arguments.rounds, arguments.overhead_steps)
    return rows, overhead.bars(rows), overhead.table(rows)


def _compact(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    row = compact.measure(arguments.rounds)
    return row, compact.bars(row), compact.table(row)


def _memory(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    rows = memory.measure()
    return rows, memory.bars(rows), memory.table(rows)


def _robustness(problems: list[Problem], arguments: argparse.Namespace) -> Measured:
    row = robustness.measure(arguments.cases, arguments.seed_from, arguments.largest_exponent)
    return row, robustness.bars(row), robustness.table(row)


_MEASURES: dict[str, Callable[[list[Problem], argparse.Namespace], Measured]] = {
    "solves": _solves,
    "overhead": _overhead,
    "compact": _compact,
    "memory": _memory,
    "robustness": _robustness,
}

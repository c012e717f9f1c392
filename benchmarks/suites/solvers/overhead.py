"""What a Picard solve takes beyond its evaluations: against a bare loop of as many.

A solve takes the steps that Picard needs to 1e-5, with a cap: beyond convergence no iterate is better than
the last, which is not what a solver does all day.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib import Picard, Stopping
from deqlib.testing import Problem

from ... import maps
from ...case import COUNT, SECONDS, Bar, Case, Picture, Row, Run, Table, product, worst_of
from ...measure import interleaved, ratios, seconds, with_spread
from ...rows import distinct, having
from ...show import COLORS

COSTLY = 2e-3  # seconds that an evaluation must take for the bars
REPEATS = 4  # rounds for each that is asked for: solves are short, and differences of a few hundredths count
LIMITS = {"tracked": 1.12, "fixed": 1.03}
BARE = "{}, bare loop"


def build(run: Run, problem: str, max_steps: int) -> list[Row]:
    """Picard that measures residuals, Picard of a fixed number of steps, and a bare loop for each."""
    subject = maps.named(problem, run.device)
    with torch.no_grad():
        until = Stopping(rtol=1e-5, max_steps=max_steps)
        needed = int(maps.solve(subject, Picard(), until).num_steps.max())
        rules = {
            "tracked": Stopping(rtol=1e-30, max_steps=needed, patience=None),
            "fixed": Stopping.steps(needed),
        }
        evaluations: dict[str, int] = {}
        contenders: dict[str, Callable[[], object]] = {}
        for name, rule in rules.items():
            contenders[name] = partial(maps.solve, subject, Picard(), rule)
            evaluations[name] = evaluations[BARE.format(name)] = maps.solve(subject, Picard(), rule).nfe
            contenders[BARE.format(name)] = _loop(subject, evaluations[name])
        times = interleaved(contenders, run.rounds if run.quick else REPEATS * run.rounds)
        evaluation = statistics.median(seconds(lambda: subject.f(subject.z0)) for _ in range(5))
    return [
        {
            "contender": name,
            "evaluations": evaluations[name],
            "seconds": times[name],
            "evaluation_seconds": evaluation,
        }
        for name in contenders
    ]


def _loop(problem: Problem, evaluations: int) -> Callable[[], Tensor]:
    def loop() -> Tensor:
        z = problem.z0
        for _ in range(evaluations):
            z = problem.f(z)
        return z

    return loop


def by_problem(rows: list[Row], kind: str) -> dict[str, list[float]]:
    """Time of Picard over that of its bare loop, in every round."""
    times = {(row["problem"], row["contender"]): row["seconds"] for row in rows}
    return {
        name: ratios(times[name, kind], times[name, BARE.format(kind)]) for name in distinct(rows, "problem")
    }


def medians(rows: list[Row], kind: str) -> dict[str, float]:
    """Of `by_problem`."""
    return {name: statistics.median(values) for name, values in by_problem(rows, kind).items()}


def bars(rows: list[Row]) -> list[Bar]:
    """The worst of the costly cells decides."""
    costly = [row for row in rows if row["evaluation_seconds"] >= COSTLY]
    return [
        worst_of(
            f"Picard / bare loop, time, {kind}", medians(costly, kind), limit, "no cell is costly enough"
        )
        for kind, limit in LIMITS.items()
    ]


def table(rows: list[Row]) -> Table:
    """One line a cell."""
    evaluation = {row["problem"]: row["evaluation_seconds"] for row in rows}
    steps = {row["problem"]: row["evaluations"] for row in having(rows, contender="fixed")}
    found = {kind: by_problem(rows, kind) for kind in LIMITS}
    lines = []
    for name, cost in evaluation.items():
        cells = (with_spread(found[kind][name]) for kind in LIMITS)
        lines.append((name, f"{cost * 1e3:.2f}", str(steps[name]), *cells))
    title = "time of Picard / of a bare loop of as many evaluations"
    return Table(title, ("problem", "ms an evaluation", "steps", *LIMITS), lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    costly = {row["problem"]: row["evaluation_seconds"] >= COSTLY for row in rows}
    for axis, (kind, limit) in zip(axes, LIMITS.items(), strict=True):
        found = medians(rows, kind)
        colors = [COLORS[0] if costly[name] else COLORS[6] for name in found]
        axis.barh(list(found), [value - 1 for value in found.values()], left=1, color=colors)
        axis.axvline(limit, color=COLORS[1], linewidth=1)
        axis.set(xlabel="time / bare loop; grey: cells that are not costly")
        axis.invert_yaxis()


CASE = Case(
    "overhead",
    f"Picard against a bare loop of as many evaluations; cells of {COSTLY * 1e3:.0f} ms and more have bars",
    build,
    grid=product(problem=maps.NAMES, max_steps=[30]),
    quick=product(problem=maps.QUICK, max_steps=[10]),
    metrics={"evaluations": COUNT, "seconds": SECONDS, "evaluation_seconds": SECONDS},
    table=table,
    bars=bars,
    picture=Picture(
        _paint, lambda rows: [f"{kind}, bar {limit}" for kind, limit in LIMITS.items()], size=(5.2, 3.8)
    ),
)

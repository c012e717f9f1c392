"""Time of the implicit backward pass at one true residual of the adjoint, against torchdeq 0.1.

Everybody gets the fixed point, and only the backward pass is timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib.testing import Problem, mlp, transformer

from ... import maps
from ...case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, none_of, product, worst_of
from ...measure import geometric_mean, interleaved, marked_both_ways, milliseconds, ratio
from ...rows import by_contender, distinct, grouped, having
from ...show import COLORS, legend_below, one_two_five
from .adjoints import BUDGET, CONTENDERS, OURS, THEIR_SOLVERS, clear, ours, tuned
from .contenders import at_solution, cotangent

LIMIT, DEFAULT_LIMIT, WORST = 0.6, 0.8, 1.05  # of times over torchdeq's, the last in any one case
FLOOR, THEIR_DEFAULT = "bare products", "torchdeq Picard"


def _of_suite(name: str) -> Problem:
    return maps.by_name()[name]


# At the fixed points of the solver suite's problems the adjoint is as hard as the solve was. Two are easy.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{name: partial(_of_suite, name) for name in maps.NAMES},
    "MLP 32x1x256": partial(mlp, batch=32, tokens=1, width=256, gain=1.2),
    "transformer, easy": partial(transformer, batch=16, tokens=64, width=128, gain=0.9),
}


def build(run: Run, problem: str, target: float) -> Iterator[Row]:
    """All contenders on one problem to one residual. Finding the tolerances warms up."""
    subject = at_solution(PROBLEMS[problem]().to(device=run.device))
    g = cotangent(subject)
    attempts = {name: tuned(subject, g, target, name, contender) for name, contender in CONTENDERS.items()}
    forwards: dict[str, Callable[[], Callable[[], object]]] = {
        # A budget of what is needed: torchdeq's Broyden reserves memory for all of it.
        name: partial(_forward, partial(CONTENDERS[name], subject, attempt.rtol, attempt.products + 1), g)
        for name, attempt in attempts.items()
        if attempt.products is not None
    }
    floor = attempts[OURS].products
    if floor is not None:
        forwards[FLOOR] = partial(_bare_products, subject, g, floor)
    times = _backward_times(subject, forwards, run.rounds)
    for name, attempt in attempts.items():
        yield {"contender": name, **asdict(attempt), "seconds": times.get(name, [])}
    nothing = dict.fromkeys(("rtol", "residual", "reached", "error"))
    yield {"contender": FLOOR, **nothing, "products": floor, "seconds": times.get(FLOOR, [])}


def _forward(forward: Callable[[], Tensor], g: Tensor) -> Callable[[], object]:
    """Evaluate up to the fixed point; what is left to do is the backward pass."""
    return partial(torch.autograd.backward, forward(), g)


def _backward_times(
    problem: Problem, forwards: Mapping[str, Callable[[], Callable[[], object]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of the backward passes alone."""
    ready: dict[str, Callable[[], object]] = {}

    def prepare(name: str) -> None:
        clear(problem)
        ready[name] = forwards[name]()

    def backward(name: str) -> None:
        ready.pop(name)()

    contenders = {name: partial(backward, name) for name in forwards}
    return interleaved(contenders, rounds, warm_up=dict.fromkeys(forwards, 0.0), prepare=prepare)


def _bare_products(problem: Problem, g: Tensor, products: int) -> Callable[[], object]:
    """So many products with J^T and the gradient of all inputs, and nothing else."""
    z = problem.z0.detach().requires_grad_()
    image = problem.f(z)

    def compute() -> None:
        for _ in range(products):
            torch.autograd.grad(image, z, g, retain_graph=True)
        torch.autograd.backward(image, g, inputs=list(problem.inputs))

    return compute


def profiled(run: Run, problem: str, target: float) -> Callable[[], object]:
    """The backward pass of deqlib's default, the cell marked both ways; its forward solve takes no step."""
    subject = at_solution(PROBLEMS[problem]().to(device=run.device))
    subject, g = replace(subject, cell=marked_both_ways(subject.cell)), cotangent(subject)
    return lambda: torch.autograd.backward(ours(None, subject, target, BUDGET), g)


def bars(rows: list[Row]) -> list[Bar]:
    """deqlib's default against torchdeq's default and its fastest, and the same solvers in both."""
    found = _by_case(rows)
    ours = _of(found, OURS)
    fastest = {}
    for case, contenders in found.items():
        arrived = [r for name, r in contenders.items() if name.startswith("torchdeq") and r["reached"]]
        if arrived:
            fastest[case] = min(arrived, key=_seconds)
    raised = [
        f"{_case_of(row)}, {row['contender']}: {row['error']}"
        for row in rows
        if row["error"] and row["contender"].startswith("deqlib")
    ]
    return [
        none_of("backward passes of deqlib that raise", raised),
        none_of(
            "adjoint target that deqlib's default misses and torchdeq meets",
            [case for case, row in ours.items() if not row["reached"] and case in fastest],
        ),
        *_time_bars("default / torchdeq's default", ours, _of(found, THEIR_DEFAULT), DEFAULT_LIMIT),
        _worst_bar("default / torchdeq's default", ours, _of(found, THEIR_DEFAULT)),
        *_time_bars("default / torchdeq's fastest", ours, fastest),
        *(
            bar
            for name in THEIR_SOLVERS
            for bar in _time_bars(
                f"{name} / torchdeq's", _of(found, f"deqlib {name}"), _of(found, f"torchdeq {name}")
            )
        ),
    ]


def _seconds(row: Row) -> float:
    """The median; infinite if nothing was timed."""
    return statistics.median(row["seconds"]) if row["seconds"] else math.inf


def _case_of(row: Row) -> str:
    return f"{row['problem']}, {row['target']:.0e}"


def _by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by problem and target, and by contender."""
    return {_case_of(point[0]): by_contender(point) for point in grouped(rows, "problem", "target")}


def _of(found: dict[str, dict[str, Row]], contender: str) -> dict[str, Row]:
    return {case: rows[contender] for case, rows in found.items() if contender in rows}


def _ratios(ours: dict[str, Row], theirs: dict[str, Row]) -> tuple[dict[str, float], list[str]]:
    """Time over theirs in the cases in which ours arrives, and those of them in which both do."""
    arrived = [case for case, row in ours.items() if row["reached"] and row["seconds"]]
    timed = [case for case in arrived if case in theirs and theirs[case]["seconds"]]
    ratios = {case: ratio(ours[case]["seconds"], theirs[case]["seconds"]) for case in timed}
    return ratios, [case for case in timed if theirs[case]["reached"]]


def _worst_bar(name: str, ours: dict[str, Row], theirs: dict[str, Row]) -> Bar:
    """The case in which ours takes longest beside theirs, of those in which both arrive."""
    ratios, both = _ratios(ours, theirs)
    return worst_of(f"{name}, backward time", {case: ratios[case] for case in both}, WORST)


def _time_bars(name: str, ours: dict[str, Row], theirs: dict[str, Row], limit: float = LIMIT) -> list[Bar]:
    """Mean ratios over the cases in which ours arrives: all, and those in which both do.

    Where theirs does not arrive its time is a lower bound of what it would need.
    """
    ratios, both = _ratios(ours, theirs)
    timed = list(ratios)
    shown = "; ".join(f"{case}: {ratios[case]:.2f}" + " (bound)" * (case not in both) for case in timed)
    bars = [
        Bar(
            f"{name}, backward time, {len(both)} case{'s' * (len(both) != 1)} in which both arrive",
            geometric_mean(ratios[case] for case in both),
            limit,
            shown if len(both) == len(timed) else "",
        )
    ]
    if len(both) < len(timed):
        title = f"{name}, backward time, {len(timed)} cases in which deqlib arrives"
        bars.append(Bar(title, geometric_mean(ratios.values()), limit, shown))
    return bars


def table(rows: list[Row]) -> Table:
    """One line a problem and target; torchdeq's hooks are in the picture alone."""
    names = [name for name in (*CONTENDERS, FLOOR) if not name.endswith("hook")]
    lines = [
        (case, *(_cell(found[name]) if name in found else "-" for name in names))
        for case, found in _by_case(rows).items()
    ]
    title = "implicit backward pass: products with J^T / ms, in brackets where the residual misses the target"
    return Table(title, ("problem, residual of the adjoint", *names), lines)


def _cell(row: Row) -> str:
    if row["error"]:
        return "raised"
    shown = f"{row['products']} / {milliseconds(row['seconds'])}"
    return f"({shown})" if row["reached"] is False else shown


def _panels(rows: list[Row]) -> list[str]:
    return [f"residual of the adjoint {target:.0e}" for target in distinct(rows, "target")]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Time of every contender relative to deqlib's default, a line a problem.

    Hollow where it misses the target; in brackets where deqlib's default does.
    """
    for axis, target in zip(axes, distinct(rows, "target"), strict=True):
        here = [row for row in having(rows, target=target) if row["seconds"]]
        ours = {row["problem"]: row for row in having(here, contender=OURS)}
        lines = {problem: line for line, problem in enumerate(ours)}
        for name in (*CONTENDERS, FLOOR):
            if name == OURS:
                continue
            color, marker = _style(name)
            found = [row for row in having(here, contender=name) if row["problem"] in ours]
            axis.scatter(
                [ratio(row["seconds"], ours[row["problem"]]["seconds"]) for row in found],
                [lines[row["problem"]] for row in found],
                marker=marker,
                s=30,
                facecolors=["none" if row["reached"] is False else color for row in found],
                edgecolors=color,
                zorder=3,
            )
            axis.scatter([], [], marker=marker, color=color, label=name)
        axis.axvline(1, color="black", linewidth=1, label=OURS)
        labels = [problem if row["reached"] else f"({problem})" for problem, row in ours.items()]
        axis.set_yticks(range(len(lines)), labels, fontsize=8)
        axis.set(xscale="log", xlabel=f"time / that of {OURS}", ylim=(len(lines) - 0.5, -0.5))
        one_two_five(axis)
    legend_below(axes, columns=3 * min(len(axes), 2))


def _style(name: str) -> tuple[str, str]:
    """Color, the same of a solver in both libraries, and marker, the same of a library."""
    if name == FLOOR:
        return "grey", "D"
    library, solver, *hook = name.replace(",", "").split()
    color = COLORS[("Picard", "Anderson", "Broyden", "GMRES").index(solver)]
    return color, "o" if library == "deqlib" else "v" if hook else "s"


CASE = Case(
    "time",
    "the implicit backward pass alone, beside torchdeq's, at one true residual of the adjoint",
    build,
    grid=product(problem=PROBLEMS, target=[1e-3, 1e-6]),
    quick=product(problem=["linear 0.9", "MLP 32x1x256"], target=[1e-3]),
    metrics={
        "rtol": Metric(better=None),
        "products": COUNT,
        "residual": Metric(better=None),
        "reached": Metric("higher"),
        "error": Metric(better=None),
        "seconds": SECONDS,
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, _panels, size=(6.5, 5)),
    solve=profiled,
)

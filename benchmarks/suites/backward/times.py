"""Time of the implicit backward pass at one true residual of the adjoint, against torchdeq 0.1.

Everybody gets the fixed point, and only `.backward()` is timed. What each method's tolerance means differs,
so none is believed: the adjoint u that reaches the cell's graph is caught, its residual is computed anew in
float64, and everybody gets the loosest tolerance with which the residual meets the target.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from deqlib import GMRES, Anderson, Broyden, ImplicitDifferentiation, Picard, Solver, Stopping, fixed_point
from deqlib.testing import Problem, mlp, transformer

from ... import problems
from ...case import COUNT, SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, none_of, product, worst_of
from ...peers import torchdeq
from ...show import COLORS
from ...timing import geometric_mean, milliseconds, ratio, seconds
from .marks import marked_both_ways

LOOSER, TIGHTER = 10, 14  # most steps away from the target in the search for a tolerance
BUDGET = 150  # products with J^T that a solve may take
PATIENCE = 3.0  # seconds that one attempt may take for its tolerance to be tuned further
LIMIT, DEFAULT_LIMIT, WORST = 0.6, 0.8, 1.05  # of times over torchdeq's, the last in any one case
OURS, FLOOR, THEIR_DEFAULT = "deqlib default", "bare products", "torchdeq Picard"

# From a problem, a tolerance and the products allowed to the fixed point carrying gradient.
Contender = Callable[[Problem, float, int], Tensor]

THEIR_SOLVERS = {"Picard": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}


def _of_suite(name: str) -> Problem:
    return problems.by_name()[name]


# At the fixed points of the solver suite's problems the adjoint is as hard as the solve was. Two are easy.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{name: partial(_of_suite, name) for name in problems.NAMES},
    "MLP 32x1x256": partial(mlp, batch=32, tokens=1, width=256, gain=1.2),
    "transformer, easy": partial(transformer, batch=16, tokens=64, width=128, gain=0.9),
}


def _ours(solver: Solver | None, problem: Problem, rtol: float, products: int) -> Tensor:
    stopping = Stopping(rtol=rtol, max_steps=products - 1)  # one evaluation more than steps
    chosen: dict[str, Solver] = {} if solver is None else {"solver": solver}
    value: Tensor = fixed_point(
        problem.f,
        problem.z0,
        solver=Picard(),
        stopping=Stopping.steps(0),  # the starting point is the fixed point
        backward=ImplicitDifferentiation(stopping=stopping, **chosen),
        on_failure="ignore",
    ).value
    return value


def _theirs(solver: str, hook: bool, problem: Problem, rtol: float, products: int) -> Tensor:
    deq = torchdeq.get_deq(
        f_solver="fixed_point_iter",
        f_max_iter=0,
        ift=not hook,
        hook_ift=hook,
        b_solver=THEIR_SOLVERS[solver],
        b_tol=rtol,
        b_stop_mode="rel",
        b_max_iter=products - (solver == "Broyden"),  # its first evaluation does not count
    )
    values, _ = deq(problem.f, problem.z0)
    value: Tensor = values[-1]
    return value


CONTENDERS: dict[str, Contender] = {
    OURS: partial(_ours, None),
    "deqlib Picard": partial(_ours, Picard()),
    "deqlib Anderson": partial(_ours, Anderson()),
    "deqlib Broyden": partial(_ours, Broyden()),
    "deqlib GMRES": partial(_ours, GMRES()),
    **{
        f"torchdeq {solver}{', hook' * hook}": partial(_theirs, solver, hook)
        for solver in THEIR_SOLVERS
        for hook in (False, True)
    },
}


@dataclass(frozen=True)
class Attempt:
    """What came of a contender with a tolerance; None where there is no figure."""

    rtol: float
    products: int | None = None  # with J^T, the adjoint solve alone
    residual: float | None = None  # ||J^T u + g - u|| / ||u|| in float64, worst of the samples
    reached: bool = False
    error: str | None = None


class Tap:
    """A cell that notes the gradients that reach its images: one a product, and last the adjoint."""

    def __init__(self, cell: Callable[..., Tensor]) -> None:
        self.cell = cell
        self.count = 0
        self.last: Tensor | None = None

    def __call__(self, z: Tensor, *inputs: Any) -> Tensor:
        """The cell."""
        image = self.cell(z, *inputs)
        if image.requires_grad:
            image.register_hook(self._note)
            image = image.view_as(image)  # hooks that others put on what is returned act before ours
        return image

    def _note(self, u: Tensor) -> None:
        self.count, self.last = self.count + 1, u.detach().clone()


def at_solution(problem: Problem) -> Problem:
    """The problem started at its solution, with inputs that require gradient."""
    assert problem.solution is not None
    inputs = tuple(x.detach().clone().requires_grad_() for x in problem.inputs)
    return replace(problem, z0=problem.solution, inputs=inputs)


def build(run: Run, problem: str, target: float) -> Iterator[Row]:
    """All contenders on one problem to one residual. Finding the tolerances warms up."""
    subject = at_solution(PROBLEMS[problem]().to(device=run.device))
    g = cotangent(subject)
    attempts = {name: _tuned(subject, g, target, name, contender) for name, contender in CONTENDERS.items()}
    prepare = {
        # A budget of what is needed: torchdeq's Broyden reserves memory for all of it.
        name: partial(CONTENDERS[name], subject, attempt.rtol, attempt.products + 1)
        for name, attempt in attempts.items()
        if attempt.products is not None
    }
    floor = attempts[OURS].products
    times = _backward_times(subject, g, prepare, floor, run.rounds)
    for name, attempt in attempts.items():
        yield {"contender": name, **asdict(attempt), "seconds": times.get(name, [])}
    nothing = dict.fromkeys(("rtol", "residual", "reached", "error"))
    yield {"contender": FLOOR, **nothing, "products": floor, "seconds": times.get(FLOOR, [])}


def cotangent(problem: Problem) -> Tensor:
    """The gradient of a loss at the fixed point."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(problem.z0.shape, generator=generator, dtype=torch.float64).to(problem.z0)


def _tuned(problem: Problem, g: Tensor, target: float, name: str, contender: Contender) -> Attempt:
    """The attempt with the loosest tolerance that meets the target, in steps of a square root of 2.

    Begins at the target and loosens while it is met, or tightens until it is. Who is slow is not tuned
    beyond meeting it.
    """

    def attempt(rtol: float, products: int) -> Attempt:
        return _attempt(problem, g, target, name, contender, rtol, products)

    begin = time.perf_counter()
    found = attempt(target, BUDGET)
    slow = time.perf_counter() - begin > PATIENCE
    if found.products is not None and found.reached:
        for k in range(1, 1 if slow else LOOSER + 1):
            looser = attempt(target * 2 ** (k / 2), found.products + 1)
            if not looser.reached:
                break
            found = looser
        return found
    for k in range(1, TIGHTER + 1):
        if found.reached or found.products is None or found.products >= BUDGET:
            break
        found = attempt(target * 2 ** (-k / 2), BUDGET)
    return found


def _attempt(
    problem: Problem, g: Tensor, target: float, name: str, contender: Contender, rtol: float, products: int
) -> Attempt:
    """One backward pass, its products counted and its adjoint caught and judged."""
    tap = Tap(problem.cell)
    try:
        contender(replace(problem, cell=tap), rtol, products).backward(g)
    except Exception as error:  # who raises loses its case, not everybody's
        return Attempt(rtol, error=f"{type(error).__name__}: {error}")
    finally:
        _clear(problem)
    if tap.last is None:
        raise RuntimeError(f"{name}: no gradient reached the graph of the cell, so nothing can be measured")
    residual = adjoint_residual(problem, tap.last, g)
    known = residual if math.isfinite(residual) else None  # JSON has no NaN
    return Attempt(rtol, tap.count - 1, known, residual <= target)


def adjoint_residual(problem: Problem, u: Tensor, g: Tensor) -> float:
    """||J^T u + g - u|| / ||u|| at the starting point in float64, worst of the samples."""
    exact = problem.to(torch.float64)
    z = exact.z0.detach().requires_grad_()
    u, g = u.double(), g.double()
    (product,) = torch.autograd.grad(exact.f(z), z, u)
    residual = torch.linalg.vector_norm((product + g - u).flatten(1), dim=1)
    return float((residual / torch.linalg.vector_norm(u.flatten(1), dim=1)).max())


def _clear(problem: Problem) -> None:
    for leaf in problem.inputs:
        leaf.grad = None


def _backward_times(
    problem: Problem,
    g: Tensor,
    prepare: Mapping[str, Callable[[], Tensor]],
    products: int | None,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of the backward pass alone: contenders take turns, forwards and cleaning are not timed."""
    times: dict[str, list[float]] = {name: [] for name in prepare}
    for _ in range(rounds):
        gc.collect()  # torchdeq leaves cycles behind; who is at turn when they go would pay for them
        for name, forward in prepare.items():
            value = forward()
            times[name].append(seconds(partial(value.backward, g)))
            del value
            _clear(problem)
        if products is not None:
            times.setdefault(FLOOR, []).append(seconds(_bare_products(problem, g, products)))
            _clear(problem)
    return times


def _bare_products(problem: Problem, g: Tensor, products: int) -> Callable[[], None]:
    """So many products with J^T and the gradient of all inputs, and nothing else."""
    z = problem.z0.detach().requires_grad_()
    image = problem.f(z)

    def compute() -> None:
        for _ in range(products):
            torch.autograd.grad(image, z, g, retain_graph=True)
        image.backward(g, inputs=list(problem.inputs))

    return compute


def profiled(run: Run, problem: str, target: float) -> Callable[[], object]:
    """The backward pass of deqlib's default, the cell marked both ways; its forward solve takes no step."""
    subject = at_solution(PROBLEMS[problem]().to(device=run.device))
    subject, g = replace(subject, cell=marked_both_ways(subject.cell)), cotangent(subject)
    return lambda: _ours(None, subject, target, BUDGET).backward(g)


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
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(_case_of(row), {})[row["contender"]] = row
    return found


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
            f"{name}, backward time, {len(both)} cases in which both arrive",
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


def _targets(rows: list[Row]) -> list[float]:
    return list(dict.fromkeys(row["target"] for row in rows))


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """Time of every contender relative to deqlib's default, a line a problem.

    Hollow where it misses the target; in brackets where deqlib's default does.
    """
    for axis, target in zip(axes, _targets(rows), strict=True):
        here = [row for row in rows if row["target"] == target]
        ours = {row["problem"]: row for row in here if row["contender"] == OURS and row["seconds"]}
        lines = {problem: line for line, problem in enumerate(ours)}
        for name in (*CONTENDERS, FLOOR):
            if name == OURS:
                continue
            color, marker = _style(name)
            found = [r for r in here if r["contender"] == name and r["seconds"] and r["problem"] in ours]
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
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    handles = axes[0].get_legend_handles_labels()
    columns = 3 * min(len(axes), 2)
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


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
    picture=Picture(
        _paint, lambda rows: [f"residual of the adjoint {t:.0e}" for t in _targets(rows)], size=(6.5, 5)
    ),
    solve=profiled,
)

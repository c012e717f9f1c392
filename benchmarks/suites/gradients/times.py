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
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from deqlib import GMRES, Anderson, Broyden, ImplicitDifferentiation, Picard, Solver, Stopping, fixed_point
from deqlib.testing import Problem, mlp, suite, transformer

from ...report import Bar, none_of
from ...timing import geometric_mean, ratio, seconds

with warnings.catch_warnings():
    # Its docstrings hold invalid escapes, of which Python tells when it compiles them.
    for category in (DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", "invalid escape sequence", category)
    import torchdeq

TARGETS = (1e-3, 1e-6)
LOOSER, TIGHTER = 10, 14  # most steps away from the target in the search for a tolerance
BUDGET = 150  # products with J^T that a solve may take
PATIENCE = 3.0  # seconds that one attempt may take for its tolerance to be tuned further
LIMIT = 0.6
OURS, FLOOR, THEIR_DEFAULT = "deqlib default", "bare products", "torchdeq fixed_point_iter"

# From a problem, a tolerance and the products allowed to the fixed point carrying gradient.
Contender = Callable[[Problem, float, int], Tensor]


def cases() -> list[Problem]:
    """The problems of the solver suite, at whose fixed points the adjoint is as hard as the solve was, and
    two easy ones, float32."""
    return [
        *suite(),
        mlp(batch=32, tokens=1, width=256, gain=1.2, name="MLP 32x1x256"),
        transformer(batch=16, tokens=64, width=128, gain=0.9, name="transformer, easy"),
    ]


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
        b_solver=solver,
        b_tol=rtol,
        b_stop_mode="rel",
        b_max_iter=products - (solver == "broyden"),  # its first evaluation does not count
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
        for solver in ("fixed_point_iter", "anderson", "broyden")
        for hook in (False, True)
    },
}
# What is the same method in both libraries.
PAIRS = {
    "Picard": ("deqlib Picard", "torchdeq fixed_point_iter"),
    "Anderson": ("deqlib Anderson", "torchdeq anderson"),
    "Broyden": ("deqlib Broyden", "torchdeq broyden"),
}


@dataclass(frozen=True)
class Row:
    """One contender on one problem to one target; None where there is no figure."""

    problem: str
    target: float
    contender: str
    rtol: float  # the tolerance it was given
    products: int  # with J^T, the adjoint solve alone
    residual: float | None  # ||J^T u + g - u|| / ||u|| in float64, worst of the samples
    reached: bool
    seconds: float
    times: list[float]
    error: str | None = None

    @property
    def case(self) -> str:
        """Problem and target."""
        return f"{self.problem} {self.target:.0e}"


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


def measure(
    problems: Iterable[Problem], rounds: int, targets: Iterable[float] = TARGETS, budget: int = BUDGET
) -> list[Row]:
    """All contenders on all problems to all targets; with 0 rounds nothing is timed."""
    pairs = [(at_solution(problem), target) for problem in problems for target in targets]
    return [row for problem, target in track(pairs, "time") for row in _case(problem, target, rounds, budget)]


def _case(problem: Problem, target: float, rounds: int, budget: int) -> list[Row]:
    """All contenders on one problem. Finding the tolerances warms up."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(problem.z0.shape, generator=generator, dtype=torch.float64).to(problem.z0.dtype)
    tune = partial(_tuned, problem, g, target, budget)
    rows = [tune(name, contender) for name, contender in CONTENDERS.items()]
    prepare = {
        # A budget of what is needed: torchdeq's Broyden reserves memory for all of it.
        row.contender: partial(CONTENDERS[row.contender], problem, row.rtol, row.products + 1)
        for row in rows
        if row.error is None
    }
    floor = next(row for row in rows if row.contender == OURS)
    rows.append(replace(floor, contender=FLOOR, rtol=math.nan, residual=None, reached=False, error=None))
    times = _backward_times(problem, g, prepare, floor.products, rounds)
    taken = [times.get(row.contender, []) for row in rows]
    return [
        replace(row, times=t, seconds=statistics.median(t) if t else math.nan)
        for row, t in zip(rows, taken, strict=True)
    ]


def _tuned(problem: Problem, g: Tensor, target: float, budget: int, name: str, contender: Contender) -> Row:
    """The contender with the loosest tolerance that meets the target, in steps of a square root of 2.

    Begins at the target and loosens while it is met, or tightens until it is. Who is slow is not tuned
    beyond meeting it.
    """
    run = partial(_attempt, problem, g, target, name, contender)
    begin = time.perf_counter()
    row = run(budget, target)
    slow = time.perf_counter() - begin > PATIENCE
    if row.reached:
        if slow:
            return row
        for k in range(1, LOOSER + 1):
            looser = run(row.products + 1, target * 2 ** (k / 2))
            if not looser.reached:
                break
            row = looser
        return row
    for k in range(1, TIGHTER + 1):
        if row.reached or row.error or row.products >= budget:
            break
        row = run(budget, target * 2 ** (-k / 2))
    return row


def _attempt(
    problem: Problem, g: Tensor, target: float, name: str, contender: Contender, budget: int, rtol: float
) -> Row:
    """One backward pass, its products counted and its adjoint caught and judged."""
    row = Row(problem.name, target, name, rtol, 0, None, False, math.nan, [])
    tap = Tap(problem.cell)
    try:
        contender(replace(problem, cell=tap), rtol, budget).backward(g)
    except Exception as error:  # who raises loses its case, not everybody's
        return replace(row, error=f"{type(error).__name__}: {error}")
    finally:
        _clear(problem)
    if tap.last is None:
        raise RuntimeError(f"{name}: no gradient reached the graph of the cell, so nothing can be measured")
    residual = adjoint_residual(problem, tap.last, g)
    return replace(
        row,
        products=tap.count - 1,
        residual=residual if math.isfinite(residual) else None,  # JSON has no NaN
        reached=residual <= target,
    )


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
    problem: Problem, g: Tensor, prepare: dict[str, Callable[[], Tensor]], products: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the backward pass alone: contenders take turns, forwards and cleaning are not timed."""
    times: dict[str, list[float]] = {name: [] for name in (*prepare, FLOOR)}
    for _ in range(rounds):
        gc.collect()  # torchdeq leaves cycles behind; who is at turn when they go would pay for them
        for name, forward in prepare.items():
            value = forward()
            times[name].append(seconds(partial(value.backward, g)))
            del value
            _clear(problem)
        times[FLOOR].append(seconds(_bare_products(problem, g, products)))
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


def bars(rows: list[Row]) -> list[Bar]:
    """deqlib's default against torchdeq's default and its fastest, and the same solvers in both."""
    table = _by_case(rows)
    ours = {case: found[OURS] for case, found in table.items()}
    fastest = {}
    for case, found in table.items():
        arrived = [row for row in found.values() if row.contender.startswith("torchdeq") and row.reached]
        if arrived:
            fastest[case] = min(arrived, key=lambda row: row.seconds)
    raised = [
        f"{r.case}, {r.contender}: {r.error}" for r in rows if r.error and r.contender.startswith("deqlib")
    ]
    return [
        none_of("backward passes of deqlib that raise", raised),
        none_of(
            "adjoint target that deqlib's default misses and torchdeq meets",
            [case for case, row in ours.items() if not row.reached and case in fastest],
        ),
        *_time_bars("default / torchdeq's default", ours, _of(table, THEIR_DEFAULT)),
        *_time_bars("default / torchdeq's fastest", ours, fastest),
        *(
            bar
            for name, (a, b) in PAIRS.items()
            for bar in _time_bars(f"{name} / torchdeq's", _of(table, a), _of(table, b))
        ),
    ]


def _of(table: dict[str, dict[str, Row]], contender: str) -> dict[str, Row]:
    return {case: found[contender] for case, found in table.items() if contender in found}


def _by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row.case, {})[row.contender] = row
    return table


def _time_bars(name: str, ours: dict[str, Row], theirs: dict[str, Row]) -> list[Bar]:
    """Mean ratios over the cases in which ours arrives: all, and those in which both do.

    Where theirs does not arrive its time is a lower bound of what it would need.
    """
    arrived = [case for case, row in ours.items() if row.reached and row.times]
    timed = [case for case in arrived if case in theirs and theirs[case].times]
    ratios = {case: ratio(ours[case].times, theirs[case].times) for case in timed}
    both = [case for case in timed if theirs[case].reached]
    shown = "; ".join(f"{case}: {ratios[case]:.2f}" + " (bound)" * (case not in both) for case in timed)
    bars = [
        Bar(
            f"{name}, backward time, {len(both)} cases in which both arrive",
            geometric_mean(ratios[case] for case in both),
            LIMIT,
            shown if len(both) == len(timed) else "",
        )
    ]
    if len(both) < len(timed):
        title = f"{name}, backward time, {len(timed)} cases in which deqlib arrives"
        bars.append(Bar(title, geometric_mean(ratios.values()), LIMIT, shown))
    return bars


def ratios(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """By case: the same method in both libraries, and each of deqlib's over bare products.

    None where one of the two does not arrive.
    """
    return {
        case: {
            **{f"{name}, deqlib / torchdeq": _ratio(found[a], found[b]) for name, (a, b) in PAIRS.items()},
            f"{OURS} / {FLOOR}": _ratio(found[OURS], replace(found[FLOOR], reached=True)),
        }
        for case, found in _by_case(rows).items()
    }


def _ratio(a: Row, b: Row) -> float | None:
    return ratio(a.times, b.times) if a.reached and b.reached and a.times and b.times else None


def table(rows: list[Row]) -> Table:
    """Products, tolerance, residual and milliseconds; a row that missed its target is in brackets."""
    shown = Table(title="implicit backward pass; in brackets where the residual misses the target")
    for column in ("case", "contender", "rtol", "products", "residual", "ms", f"/ {OURS}"):
        shown.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for case, found in _by_case(rows).items():
        for name, row in found.items():
            shown.add_row(case if name == OURS else "", name, *_cells(row, found[OURS]))
        for what, value in ratios(list(found.values()))[case].items():
            shown.add_row("", what, "", "", "", "", "-" if value is None else f"{value:.2f}")
        shown.add_section()
    return shown


def _cells(row: Row, ours: Row) -> list[str]:
    if row.error is not None:
        return ["raised", "", "", "", ""]
    relative = f"{ratio(row.times, ours.times):.2f}" if row.times and ours.times else "-"
    residual = "-" if row.residual is None else f"{row.residual:.1e}"
    rtol = "-" if math.isnan(row.rtol) else f"{row.rtol:.1e}"
    cells = [rtol, str(row.products), residual, f"{row.seconds * 1e3:,.1f}", relative]
    return cells if row.reached or row.contender == FLOOR else [f"({cell})" for cell in cells]


def record(rows: list[Row]) -> dict[str, Any]:
    """For JSON, which has no NaN."""

    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "rows": [{name: clean(value) for name, value in asdict(row).items()} for row in rows],
        "ratios": ratios(rows),
    }

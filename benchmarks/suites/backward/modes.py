"""What a backward mode costs and what its gradient is worth: error, time of a training step, memory.

A training step is a forward solve from zeros and a backward pass, with the gradient of every input and
weight. The forward solve is Picard's to a relative residual of 1e-5, the same in both libraries; only
`SharedInverse` and `Reversible` need solvers of their own. The exact gradient is that at the known fixed
point in float64, its adjoint found by a bare loop of products with the transposed Jacobian. The gradient g
that arrives is drawn at random; one in directions that the solve went would suit `SharedInverse` better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deqlib import Auto, ImplicitDifferentiation, Stopping
from deqlib.diagnostics import saved_bytes
from deqlib.testing import Problem, convolution, mixer, mlp, transformer

from ...baselines import torchdeq
from ...case import SECONDS, Case, Metric, Picture, Row, Run, Table, product
from ...measure import interleaved, marked_both_ways, milliseconds, peak_bytes
from ...rows import distinct, having
from ...show import COLORS, legend_below, one_two_five, pivot
from . import contenders
from .contenders import cotangent, solved, trained
from .random_maps import flat, relative_error

FORWARD = Stopping(rtol=1e-5, max_steps=200)

PROBLEMS: dict[str, Callable[..., Problem]] = {  # Picard converges on all
    "MLP": partial(mlp, tokens=64, width=128, gain=1.2),
    "mixer": partial(mixer, tokens=64, width=128, gain=1.0),
    "transformer": partial(transformer, tokens=64, width=128, gain=0.9),
    "convolution": partial(convolution, channels=32, side=16, gain=0.8),
}

Contender = Callable[[Problem], Tensor]  # to the fixed point carrying gradient


_PEER_STOPPING = {  # of torchdeq's layers, which count evaluations
    "f_tol": FORWARD.rtol,
    "f_max_iter": FORWARD.max_steps + 1,
    "b_tol": contenders.ADJOINT.rtol,
    "b_max_iter": contenders.ADJOINT.max_steps + 1,
}
MODES: dict[str, Contender] = {
    **{
        name: partial(solved, mode, solver, stopping=FORWARD)
        for name, (mode, solver) in contenders.MODES.items()
    },
    **{
        name: partial(torchdeq.layer, {**_PEER_STOPPING, **settings})
        for name, settings in contenders.PEERS.items()
    },
}


def build(run: Run, problem: str, batch: int) -> Iterator[Row]:
    """Error, seconds of a step and bytes of every mode."""
    exact = PROBLEMS[problem](batch=batch, dtype=torch.float64).to(device=run.device)
    g = cotangent(exact)
    right = exact_gradient(exact, g)
    subject = trained(exact.to(torch.float32))
    g = g.float()
    steps = {name: partial(_step, mode, subject, g) for name, mode in MODES.items()}
    errors = {name: relative_error(step().double(), right) for name, step in steps.items()}
    times = interleaved(steps, run.rounds, warm_up=dict.fromkeys(steps, 0.0))
    for name, step in steps.items():
        yield {
            "contender": name,
            "gradient_error": errors[name] if math.isfinite(errors[name]) else None,
            "seconds": times[name],
            "saved_bytes": saved_bytes(partial(MODES[name], subject), exclude=subject.inputs),
            "peak_bytes": peak_bytes(step, run.device),
        }


def exact_gradient(problem: Problem, g: Tensor) -> Tensor:
    """The gradient of <g, z> with respect to all inputs at the known fixed point, in one vector.

    Raises:
        RuntimeError: u <- J^T u + g does not converge.
    """
    assert problem.solution is not None
    subject = trained(problem)
    z = problem.solution.clone().requires_grad_()
    image = subject.f(z)
    u = g
    for _ in range(2000):
        (product_,) = torch.autograd.grad(image, z, u, retain_graph=True)
        before, u = u, product_ + g
        if (u - before).norm() < 1e-12 * u.norm():  # never at infinity
            return flat(torch.autograd.grad(image, subject.inputs, u))
    raise RuntimeError(f"{problem.name}: the series of its adjoint does not converge")


def _step(mode: Contender, problem: Problem, g: Tensor) -> Tensor:
    """Forward and backward; the gradients in one vector."""
    return flat(torch.autograd.grad(mode(problem), problem.inputs, g))


def profiled(run: Run, problem: str, batch: int) -> Callable[[], object]:
    """A training step with deqlib's default solver and mode, the cell marked both ways."""
    subject = trained(PROBLEMS[problem](batch=batch).to(device=run.device))
    subject = replace(subject, cell=marked_both_ways(subject.cell))
    default = partial(solved, ImplicitDifferentiation(), Auto(), stopping=FORWARD)
    return partial(_step, default, subject, cotangent(subject))


def table(rows: list[Row]) -> Table:
    """One line a mode."""
    title = "relative error of the gradient / ms a training step / MB saved for backward"
    return pivot(title, rows, "mode", "contender", "problem", _cell)


def _cell(row: Row) -> str:
    error = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"
    return f"{error} / {milliseconds(row['seconds'])} / {row['saved_bytes'] / 1e6:.1f}"


# One color a method, one marker a library and variant.
_STYLES = {
    "ImplicitDifferentiation": (COLORS[0], "o"),
    "ImplicitDifferentiation, Picard": (COLORS[0], "D"),
    "SharedInverse": (COLORS[1], "o"),
    "SharedInverse, 5 refining steps": (COLORS[1], "D"),
    "PhantomGradient, 5 steps": (COLORS[2], "o"),
    "PhantomGradient, Neumann": (COLORS[2], "D"),
    "JFB": (COLORS[3], "o"),
    "StochasticJFB, 5 + 6 steps": (COLORS[4], "o"),
    "Unroll": (COLORS[5], "o"),
    "Unroll, checkpoint": (COLORS[5], "D"),
    "Reversible": (COLORS[7], "o"),
    "torchdeq ift": (COLORS[0], "s"),
    "torchdeq hook_ift": (COLORS[0], "v"),
    "torchdeq grad=1": (COLORS[3], "s"),
    "torchdeq grad=5, tau=0.5": (COLORS[2], "s"),
}


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    """A dot a mode, its area the peak of memory."""
    for axis, problem in zip(axes, distinct(rows, "problem"), strict=True):
        here = [row for row in having(rows, problem=problem) if row["gradient_error"] and row["seconds"]]
        least = min((row["peak_bytes"] for row in here), default=1)
        for row in here:
            color, marker = _STYLES.get(row["contender"], ("grey", "o"))
            place = (statistics.median(row["seconds"]) * 1e3, row["gradient_error"])
            area = 25 * row["peak_bytes"] / least
            axis.scatter(*place, s=area, color=color, marker=marker, alpha=0.7, linewidths=0)
            axis.scatter([], [], s=30, color=color, marker=marker, label=row["contender"])
        axis.set(
            xscale="log", yscale="log", xlabel="ms a training step", ylabel="relative error of the gradient"
        )
        axis.margins(0.1)
        one_two_five(axis)
    legend_below(axes, columns=2 if len(axes) == 1 else 4)


CASE = Case(
    "modes",
    "every backward mode, torchdeq's beside: error of the gradient, time of a training step, memory",
    build,
    grid=product(problem=PROBLEMS, batch=[16]),
    quick=product(problem=["MLP", "convolution"], batch=[2]),
    metrics={
        "gradient_error": Metric(noisy=True),
        "seconds": SECONDS,
        "saved_bytes": Metric(),
        "peak_bytes": Metric(),
    },
    table=table,
    picture=Picture(
        _paint,
        lambda rows: [f"{problem}; area: peak memory" for problem in distinct(rows, "problem")],
        columns=2,
        size=(5.2, 3.8),
    ),
    solve=profiled,
)

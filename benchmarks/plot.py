"""Pictures of solves."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deqlib import fixed_point
from deqlib.testing import Problem

from .contenders import SOLVERS, stopping

SHOWN = ("Picard", "Anderson", "Broyden", "Auto")
COLUMNS = 4


def traces(problems: list[Problem], rtol: float, evaluations: int, path: Path) -> None:
    """Worst relative residual of the batch against evaluations, one panel a problem, as a PNG."""
    columns = min(COLUMNS, len(problems))
    rows = -(-len(problems) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(problems) :]:
        axis.set_axis_off()
    for axis, problem in zip(axes.flat, problems, strict=False):
        for name in SHOWN:
            style = "--" if name == "Auto" else "-"  # it lies on Anderson wherever that arrives
            axis.plot(_trace(problem, name, rtol, evaluations), style, label=name, linewidth=1.2)
        axis.axhline(rtol, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=problem.name, yscale="log", ylim=(rtol / 10, 10))
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("evaluations of the cell")
    figure.supylabel("relative residual, worst sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _trace(problem: Problem, name: str, rtol: float, evaluations: int) -> list[float]:
    with torch.no_grad():
        solution = fixed_point(
            problem.cell,
            problem.z0,
            problem.inputs,
            solver=SOLVERS[name],
            stopping=stopping(rtol, evaluations),
            on_failure="ignore",
        )
    assert solution.trace is not None
    worst: list[float] = solution.trace.amax(1).tolist()
    return worst

"""Diagnoses and ablations as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .findings import Findings
from .reports import GradientReport, SolveReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIDDEN = 1e-20  # residuals of zero have no place on a logarithmic axis
_BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def draw(found: Findings, path: str | Path | None) -> Figure:
    """Four panels, see `Diagnosis.plot`; saved where there is a path."""
    figure = _new_figure("Diagnosis.plot")
    panels = figure.subplots(2, 2)
    _residuals(panels[0, 0], found)
    _sizes(panels[0, 1], found)
    _cosines(panels[1, 0], found)
    _paths(panels[1, 1], found)
    return _saved(figure, path)


def draw_ablation(
    solvers: Sequence[SolveReport],
    backwards: Sequence[GradientReport],
    rtol: float | None,
    path: str | Path | None,
) -> Figure:
    """Four panels, see `Ablation.plot`; saved where there is a path."""
    figure = _new_figure("Ablation.plot")
    panels = figure.subplots(2, 2)
    evaluations = [list(range(1, report.nfe + 1)) for report in solvers]
    times = [
        [1e3 * report.seconds * count / report.nfe for count in counts]
        for report, counts in zip(solvers, evaluations, strict=True)
    ]
    _solves(panels[0, 0], solvers, rtol, evaluations, "evaluations of the cell")
    _solves(panels[0, 1], solvers, rtol, times, "ms, spread evenly over the evaluations")
    _modes(panels[1, 0], backwards, [1e3 * mode.seconds for mode in backwards], "ms of solve and backward")
    _modes(panels[1, 1], backwards, [mode.saved_bytes / 1e6 for mode in backwards], "MB kept for backward")
    panels[1, 0].set_xlim(left=0)
    panels[1, 1].set_xscale("symlog", linthresh=1e-3)
    panels[1, 1].set_xlim(left=0)
    # One legend a row, of both its panels.
    for row in panels:
        if row[0].get_legend_handles_labels()[0]:
            row[1].legend(*row[0].get_legend_handles_labels(), frameon=False, fontsize=8, **_BESIDE)
    return _saved(figure, path)


def _new_figure(owner: str) -> Figure:
    """Nothing global is touched: the figure belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{owner}: needs matplotlib, which is not installed; pip install matplotlib, or the extra "
            "deqlib[viar]"
        ) from error
    return Figure(figsize=(9, 6), layout="constrained")


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _solves(
    axes: Any,
    solvers: Sequence[SolveReport],
    rtol: float | None,
    places: Sequence[Sequence[float]],
    label: str,
) -> None:
    """Worst residual of the batch, its end marked, the tolerance dotted."""
    for report, where in zip(solvers, places, strict=True):
        shown = _shown(report.worst)
        axes.plot(where, shown, label=report.name, linewidth=1.3, marker="o", markersize=4, markevery=[-1])
    _tolerance(axes, rtol)
    axes.set(xlabel=label, ylabel="worst relative residual")


def _tolerance(axes: Any, rtol: float | None) -> None:
    """The tolerance dotted, on a logarithmic axis that begins a digit below it."""
    rtol = rtol or _HIDDEN
    axes.axhline(rtol, color="grey", linestyle=":", linewidth=0.8)
    axes.set(yscale="log", ylim=(rtol / 10, 10))


def _modes(axes: Any, modes: Sequence[GradientReport], places: list[float], label: str) -> None:
    """A point a mode: the larger error of its gradients over what it costs."""
    errors = _shown(torch.tensor([mode.worst_error for mode in modes], dtype=torch.float64))
    axes.set(xlabel=label, ylabel="relative error of the gradient")
    if all(map(math.isnan, errors)):  # a logarithmic axis without a value would be refused
        axes.text(0.5, 0.5, "nothing to compare", ha="center", transform=axes.transAxes)
        return
    for mode, where, error, marker in zip(modes, places, errors, cycle("osD^vP*X<>"), strict=False):
        axes.plot([where], [error], marker, label=mode.name, markersize=6)
    axes.set_yscale("log")
    axes.margins(0.1)


def _residuals(axes: Any, found: Findings) -> None:
    """Worst of the batch as a line, the median dashed, the tolerance dotted."""
    for report in found.solvers:
        (line,) = axes.plot(_shown(report.worst), label=report.name, linewidth=1.3)
        axes.plot(_shown(report.median), "--", color=line.get_color(), linewidth=0.8)
    _tolerance(axes, found.stopping.rtol)
    axes.set(
        title="worst (line) and median (dashed) sample",
        xlabel="evaluations of the cell",
        ylabel="relative residual",
    )
    axes.legend(frameon=False, fontsize=8)


def _sizes(axes: Any, found: Findings) -> None:
    """What J does, sample by sample in the order of the spectral radius."""
    order = found.spectral_radius.argsort()
    rows = {
        "spectral radius": found.spectral_radius,
        "spectral norm": found.spectral_norm,
        "contraction of Picard": found.contraction,
    }
    for (name, values), marker in zip(rows.items(), "osx", strict=True):
        axes.plot(_finite(values[order]), marker, label=name, markersize=4, fillstyle="none")
    axes.axhline(1, color="grey", linestyle=":", linewidth=0.8)
    axes.set(title="Jacobian at the fixed point", xlabel="sample, by spectral radius", ylabel="size")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _cosines(axes: Any, found: Findings) -> None:
    """A bar for the tensors and one for the inputs of every mode."""
    nan = float("nan")
    names = [mode.name for mode in found.gradients]
    places = torch.arange(len(names), dtype=torch.float64)
    kinds = {
        "parameters": [nan if mode.cosine is None else mode.cosine for mode in found.gradients],
        "inputs": [nan if mode.input_cosine is None else mode.input_cosine for mode in found.gradients],
    }
    for shift, (kind, values) in zip((-0.2, 0.2), kinds.items(), strict=True):
        axes.barh((places + shift).tolist(), values, height=0.36, label=kind)
    axes.axvline(1, color="grey", linestyle=":", linewidth=0.8)
    axes.set_yticks(places.tolist(), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(title="gradients", xlabel="cosine to the exact gradient")
    # Below the axis: within it bars would lie under the legend.
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _paths(axes: Any, found: Findings) -> None:
    """Distance between fixed points from several starts, smallest first."""
    if found.path is None or bool(found.path.distance.isnan().all()):
        reason = "not measured" if found.path is None else "fewer than two starts converged"
        axes.text(0.5, 0.5, reason, ha="center", transform=axes.transAxes)
    else:
        axes.plot(_shown(found.path.distance.sort().values), "o", markersize=4, fillstyle="none")
    axes.set(
        title="path dependence",
        xlabel="sample, by distance",
        ylabel="relative distance",
        yscale="log",
        ylim=(1e-8, 3),
    )


def _shown(values: Tensor) -> list[float]:
    """For a logarithmic axis: what is not finite becomes a gap, zero lies below the frame."""
    return _finite(values.double().clamp_min(_HIDDEN))


def _finite(values: Tensor) -> list[float]:
    shown: list[float] = values.double().nan_to_num(float("nan"), float("nan"), float("nan")).tolist()
    return shown

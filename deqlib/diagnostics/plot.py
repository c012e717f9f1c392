"""Diagnoses and ablations as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .ablate import Ablation
    from .report import Diagnosis

_HIDDEN = 1e-20  # residuals of zero have no place on a logarithmic axis
_BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def draw(found: Diagnosis) -> Figure:
    """Four panels; see `Diagnosis.plot`."""
    figure = _new_figure("Diagnosis.plot")
    panels = figure.subplots(2, 2)
    _residuals(panels[0, 0], found)
    _sizes(panels[0, 1], found)
    _cosines(panels[1, 0], found)
    _paths(panels[1, 1], found)
    return figure


def draw_ablation(found: Ablation) -> Figure:
    """Four panels; see `Ablation.plot`."""
    figure = _new_figure("Ablation.plot")
    panels = figure.subplots(2, 2)
    evaluations = [list(range(1, len(row.curve) + 1)) for row in found.solvers]
    times = [
        [1e3 * row.seconds * count / len(row.curve) for count in counts]
        for row, counts in zip(found.solvers, evaluations, strict=True)
    ]
    _solves(panels[0, 0], found, evaluations, "evaluations of the cell")
    _solves(panels[0, 1], found, times, "ms, spread evenly over the evaluations")
    _modes(panels[1, 0], found, [1e3 * row.seconds for row in found.backwards], "ms of solve and backward")
    _modes(panels[1, 1], found, [row.saved_bytes / 1e6 for row in found.backwards], "MB kept for backward")
    panels[1, 0].set_xlim(left=0)
    panels[1, 1].set_xscale("symlog", linthresh=1e-3)
    panels[1, 1].set_xlim(left=0)
    # One legend a row, of both its panels.
    for row in panels:
        if row[0].get_legend_handles_labels()[0]:
            row[1].legend(*row[0].get_legend_handles_labels(), frameon=False, fontsize=8, **_BESIDE)
    return figure


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


def _solves(axes: Any, found: Ablation, places: Sequence[Sequence[float]], label: str) -> None:
    """Worst residual of the batch, its end marked, the tolerance dotted."""
    for row, where in zip(found.solvers, places, strict=True):
        shown = _shown(torch.tensor(row.curve, dtype=torch.float64))
        axes.plot(where, shown, label=row.name, linewidth=1.3, marker="o", markersize=4, markevery=[-1])
    rtol = found.stopping.rtol or _HIDDEN
    axes.axhline(rtol, color="grey", linestyle=":", linewidth=0.8)
    axes.set(xlabel=label, ylabel="worst relative residual", yscale="log", ylim=(rtol / 10, 10))


def _modes(axes: Any, found: Ablation, places: list[float], label: str) -> None:
    """A point a mode: the larger error of its gradients over what it costs."""
    errors = _shown(torch.tensor([row.worst_error for row in found.backwards], dtype=torch.float64))
    axes.set(xlabel=label, ylabel="relative error of the gradient")
    if all(map(math.isnan, errors)):  # a logarithmic axis without a value would be refused
        axes.text(0.5, 0.5, "nothing to compare", ha="center", transform=axes.transAxes)
        return
    for row, where, error, marker in zip(found.backwards, places, errors, cycle("osD^vP*X<>"), strict=False):
        axes.plot([where], [error], marker, label=row.name, markersize=6)
    axes.set_yscale("log")
    axes.margins(0.1)


def _residuals(axes: Any, found: Diagnosis) -> None:
    """Worst of the batch as a line, the median dashed, the tolerance dotted."""
    for report in found.solvers:
        (line,) = axes.plot(_shown(report.worst), label=report.name, linewidth=1.3)
        axes.plot(_shown(report.median), "--", color=line.get_color(), linewidth=0.8)
    rtol = found.stopping.rtol or _HIDDEN
    axes.axhline(rtol, color="grey", linestyle=":", linewidth=0.8)
    axes.set(
        title="worst (line) and median (dashed) sample",
        xlabel="evaluations of the cell",
        ylabel="relative residual",
        yscale="log",
        ylim=(rtol / 10, 10),
    )
    axes.legend(frameon=False, fontsize=8)


def _sizes(axes: Any, found: Diagnosis) -> None:
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


def _cosines(axes: Any, found: Diagnosis) -> None:
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


def _paths(axes: Any, found: Diagnosis) -> None:
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

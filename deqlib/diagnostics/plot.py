"""A diagnosis as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import Diagnosis

_HIDDEN = 1e-20  # residuals of zero have no place on a logarithmic axis


def draw(found: Diagnosis) -> Figure:
    """Four panels; see `Diagnosis.plot`. Nothing global is touched: the figure belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Diagnosis.plot: needs matplotlib, which is not installed; pip install matplotlib, or the extra "
            "deqlib[viar]"
        ) from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    _residuals(panels[0, 0], found)
    _sizes(panels[0, 1], found)
    _cosines(panels[1, 0], found)
    _paths(panels[1, 1], found)
    return figure


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

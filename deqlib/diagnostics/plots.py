"""Diagnoses and ablations as figures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .findings import Findings
from .reports import GradientReport, SolveReport
from .tables import broken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIDDEN = 1e-20  # residuals of zero have no place on a logarithmic axis
_NAME = 34  # characters of a name before it goes on in the next line
_PANEL = (4.2, 3.0)  # inches, the least that a panel gets with its labels
_LINE = 0.15  # inches that a line of small text takes
_SMALL = 8  # points
_HOLLOW: dict[str, Any] = {"markersize": 4, "fillstyle": "none"}
_BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}

Named = Sequence[tuple[str, SolveReport]]
NamedModes = Sequence[tuple[str, GradientReport]]


def draw(found: Findings, path: str | Path | None) -> Figure:
    """Four panels, see `Diagnosis.plot`; saved where there is a path."""
    solves, modes = found.named_solvers(), found.named_gradients()
    bars = sum(_bar_height(name) for name, _ in modes)
    figure, panels = _new_figure("Diagnosis.plot", _LINE * _lines(name for name, _ in solves), bars)
    _residuals(panels[0][0], solves, found.stopping.rtol)
    _sizes(panels[0][1], found)
    _cosines(panels[1][0], modes)
    _paths(panels[1][1], found)
    return _saved(figure, path)


def draw_ablation(
    solvers: Named,
    backwards: NamedModes,
    rtol: float | None,
    path: str | Path | None,
) -> Figure:
    """Four panels, see `Ablation.plot`; saved where there is a path."""
    heights = [_LINE * _lines(name for name, _ in rows) for rows in (solvers, backwards)]
    figure, panels = _new_figure("Ablation.plot", *heights)
    evaluations = [list(range(1, len(report.trace) + 1)) for _, report in solvers]
    times = [
        [1e3 * report.seconds * count / report.nfe for count in counts]
        for (_, report), counts in zip(solvers, evaluations, strict=True)
    ]
    modes = [mode for _, mode in backwards]
    kept = [math.nan if mode.saved_bytes is None else float(mode.saved_bytes) for mode in modes]
    _whole_numbers(panels[0][0])
    _solves(panels[0][0], solvers, rtol, evaluations, "evaluations of the cell")
    _solves(panels[0][1], solvers, rtol, times, "ms, spread evenly over the evaluations")
    _modes(panels[1][0], backwards, [1e3 * mode.seconds for mode in modes], "ms of solve and backward")
    unit, size = ("MB", 1e6) if max([0.0, *filter(math.isfinite, kept)]) >= 1e6 else ("kB", 1e3)
    _modes(panels[1][1], backwards, [count / size for count in kept], f"{unit} kept for backward")
    for axes in panels[1]:
        axes.set_xlim(left=0)
    # One legend a row, of both its panels.
    for row in panels:
        if row[0].get_legend_handles_labels()[0]:
            _legend(row[1], row[0])
    return _saved(figure, path)


def _new_figure(owner: str, *texts: float) -> tuple[Figure, list[list[Any]]]:
    """A figure of two panels a row, every row as high as the inches of text beside it need.

    Nothing global is touched: the figure belongs to no window.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{owner}: needs the package matplotlib ({error}); pip install 'deqlib[plot]'"
        ) from error
    heights = [max(_PANEL[1], text + 0.4) for text in texts]
    # Beside the panels there is room for a column of names a row, of lines as long as `_NAME`.
    figure = Figure(figsize=(2 * _PANEL[0] + 4.2, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 2, height_ratios=heights, squeeze=False)
    return figure, [list(row) for row in panels]


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is None:
        return figure
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")  # whose ending says the format
    try:
        figure.savefig(partial, dpi=120)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    return figure


def _short(name: str) -> str:
    """The name in lines of `_NAME` characters."""
    return "\n".join(broken(name, _NAME))


def _lines(names: Any) -> int:
    """Lines that the names take."""
    return sum(len(broken(name, _NAME)) for name in names)


def _colors(number: int) -> list[Any]:
    """So many colours that can be told apart."""
    import matplotlib

    if number <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(10)]
    return [matplotlib.colormaps["turbo"](i / (number - 1)) for i in range(number)]


def _legend(axes: Any, source: Any | None = None) -> None:
    """Beside the panel, where no curve lies; of another panel's curves where one is given."""
    handles, labels = (source or axes).get_legend_handles_labels()
    axes.legend(handles, labels, frameon=False, fontsize=_SMALL, **_BESIDE)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10)


def _say(axes: Any, words: str) -> None:
    """In the middle of a panel that has nothing to show."""
    axes.text(0.5, 0.5, words, ha="center", transform=axes.transAxes)


def _solves(
    axes: Any, solvers: Named, rtol: float | None, places: Sequence[Sequence[float]], label: str
) -> None:
    """Worst residual of the batch, its end marked, the tolerance dotted."""
    colors = _colors(len(solvers))
    for (name, report), where, color in zip(solvers, places, colors, strict=False):
        shown, style = _shown(report.worst), {"linewidth": 1.3, "marker": "o", "markersize": 4}
        axes.plot(where, shown, label=_told(name, report), markevery=[-1], color=color, **style)
    _tolerance(axes, rtol, [report for _, report in solvers])
    axes.set(xlabel=label, ylabel="worst relative residual")


def _told(name: str, report: SolveReport) -> str:
    """A name in the legend, with a word where there is no curve to see."""
    return _short(name if bool(report.worst.isfinite().any()) else name + ": not finite")


def _tolerance(axes: Any, rtol: float | None, reports: Sequence[SolveReport]) -> None:
    """The tolerance dotted, on a logarithmic axis that shows a digit below it, and all ends."""
    if rtol:
        axes.axhline(rtol, color="grey", linestyle=":", linewidth=0.8)
    curves = [curve.double() for report in reports for curve in (report.worst, report.median)]
    values = torch.cat([*curves, torch.ones(1, dtype=torch.float64)])
    values = values[values.isfinite() & (values > _HIDDEN)]
    # What runs away says so by leaving the frame.
    top = min(float(values.max()), 1e3)
    lowest = min(rtol / 10 if rtol else 0.1, float(values.min()) / 3)
    axes.set(yscale="log", ylim=(lowest, 10 * top))
    if not any(bool(report.worst.isfinite().any()) for report in reports):
        _say(axes, "not finite" if reports else "nothing to compare")
        axes.set_xticks([])


def _whole_numbers(axes: Any) -> None:
    """Evaluations and samples have no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def _modes(axes: Any, modes: NamedModes, places: list[float], label: str) -> None:
    """A point a mode: the larger error of its gradients over what it costs."""
    errors = [mode.worst_error for _, mode in modes]
    axes.set(xlabel=label, ylabel="relative error of the gradient")
    if all(map(math.isnan, errors)):  # a logarithmic axis without a value would be refused
        _say(axes, "nothing to compare")
        return
    rows = zip(modes, places, errors, cycle("osD^vP*X<>h"), _colors(len(modes)), strict=False)
    # No error at all stands a digit below the smallest.
    lowest = min([error for error in errors if 0 < error < math.inf], default=1e-15) / 10
    for (name, _), where, error, marker, color in rows:
        told = name if math.isfinite(error) else name + ": not known"
        told = told if error != 0 else name + ": no error"
        style = {"color": color, "markersize": 6, "clip_on": False}
        axes.plot([where], [max(error, lowest)], marker, label=_short(told), **style)
    axes.set_yscale("log")
    axes.margins(0.1)
    if (large := max(filter(math.isfinite, places), default=0)) > 0:
        small = min((place for place in places if place > 0), default=large)
        if large > 30 * small:
            axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(small)))
    if all(map(math.isnan, places)):
        _say(axes, "cannot be counted")


def _residuals(axes: Any, solves: Named, rtol: float | None) -> None:
    """Worst of the batch as a line, the median dashed, the tolerance dotted."""
    for (name, report), color in zip(solves, _colors(len(solves)), strict=False):
        places = range(1, len(report.trace) + 1)
        axes.plot(places, _shown(report.worst), label=_told(name, report), color=color, linewidth=1.3)
        axes.plot(places, _shown(report.median), "--", color=color, linewidth=0.8)
    axes.set(xlabel="evaluations of the cell", ylabel="relative residual")
    _whole_numbers(axes)
    _tolerance(axes, rtol, [report for _, report in solves])
    _title(axes, "worst sample (line), median (dashed)")
    _legend(axes)


def _sizes(axes: Any, found: Findings) -> None:
    """What J does, sample by sample in the order of the spectral radius."""
    order = found.spectral_radius.argsort()
    rows = {
        "spectral radius": found.spectral_radius,
        "spectral norm": found.spectral_norm,
        "contraction of Picard": found.contraction,
    }
    places = list(range(1, len(order) + 1))
    for (name, values), marker in zip(rows.items(), "osx", strict=True):
        # Whole markers at the frame too, which holds all values.
        axes.plot(places, _finite(values[order]), marker, label=name, clip_on=False, **_HOLLOW)
    axes.axhline(1, color="grey", linestyle=":", linewidth=0.8)
    axes.set(xlabel="sample, by spectral radius", ylabel="size", xlim=(0.5, len(places) + 0.5))
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _title(axes, "Jacobian at the fixed point")
    if not any(bool(values.isfinite().any()) for values in rows.values()):
        _say(axes, "not finite")
        axes.set_xticks([])
    _legend(axes)


def _bar_height(name: str) -> float:
    """Inches that the two bars of a mode and its name take."""
    return max(0.4, _LINE * (_lines([name]) + 1))


def _cosines(axes: Any, modes: NamedModes) -> None:
    """A bar for the tensors and one for the inputs of every mode, in inches from the top."""
    nan = float("nan")
    heights = [_bar_height(name) for name, _ in modes]
    places = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    kinds = {
        "parameters": [nan if mode.cosine is None else mode.cosine for _, mode in modes],
        "inputs": [nan if mode.input_cosine is None else mode.input_cosine for _, mode in modes],
    }
    for shift, (kind, values) in zip((-0.08, 0.08), kinds.items(), strict=True):
        axes.barh([place + shift for place in places], values, height=0.15, label=kind)
    axes.axvline(1, color="grey", linestyle=":", linewidth=0.8)
    axes.set_yticks(places, [_short(name) for name, _ in modes], fontsize=_SMALL)
    known = [value for values in kinds.values() for value in values if math.isfinite(value)]
    axes.set(xlim=(min([0.0, *known]) * 1.05, 1.05), ylim=(sum(heights), 0))
    axes.set_xlabel("cosine to the exact gradient")
    _title(axes, "gradients")
    if not known:
        _say(axes, "not known")
    _legend(axes)


def _paths(axes: Any, found: Findings) -> None:
    """Distance between fixed points from several starts, smallest first."""
    axes.set(xlabel="sample, by distance", ylabel="relative distance")
    _title(axes, "path dependence")
    if found.path is None or bool(found.path.distance.isnan().all()):
        reason = "not measured" if found.path is None else "fewer than two starts converged"
        _say(axes, reason)
        axes.set(xticks=[], yticks=[])
        return
    distances = found.path.distance.sort().values
    places = list(range(1, len(distances) + 1))
    axes.plot(places, _shown(distances), "o", **_HOLLOW)
    seen = distances[distances > _HIDDEN]
    axes.set(
        yscale="log",
        xlim=(0.5, len(places) + 0.5),
        ylim=(min(1e-8, float(seen.min()) / 3) if seen.numel() else 1e-8, 3),
    )
    if not seen.numel():
        _say(axes, "no distance at all")
    _whole_numbers(axes)


def _shown(values: Tensor) -> list[float]:
    """For a logarithmic axis: what is not finite becomes a gap, zero lies below the frame."""
    return _finite(values.double().clamp_min(_HIDDEN))


def _finite(values: Tensor) -> list[float]:
    shown: list[float] = values.double().nan_to_num(float("nan"), float("nan"), float("nan")).tolist()
    return shown

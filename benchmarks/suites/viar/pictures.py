"""Pictures of what was measured, one a part, as PNGs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, THEIRS, OTHER = "#1f6f8b", "#d1495b", "#8d99ae"


def draw(parts: dict[str, Any], out: Path) -> list[Path]:
    """Draw the parts that have a picture, beside `out`."""
    paths = []
    for part, (panels, paint) in _PICTURES.items():
        if part in parts:
            figure = Figure(figsize=(4.6 * panels, 3.4), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots(1, panels, squeeze=False)[0]
            paint(parts[part], list(axes))
            for axis in axes:
                axis.grid(alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
            paths.append(out.with_name(f"{out.stem}_{part}.png"))
            figure.savefig(paths[-1], dpi=130)
    return paths


def _cache(row: dict[str, Any], axes: list[Axes]) -> None:
    (axis,) = axes
    for kind, color in (("equilibrium", OURS), ("iterate", OTHER)):
        counts = [int(n) for n in row[kind]]
        shares = [size / row["var"] for size in row[kind].values()]
        axis.plot(counts, shares, "o-", color=color, label=f"VIAR, {kind} cache")
    axis.axhline(1, color=THEIRS, linestyle="--", label="VAR")
    axis.set(xlabel="iterations a scale", ylabel="cache / VAR's")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _speed(rows: dict[str, Any], axes: list[Axes]) -> None:
    (axis,) = axes
    names = list(rows)[::-1]
    medians = [statistics.median(rows[name]["seconds"]["tokens"]) for name in names]
    colors = [THEIRS if name.startswith("baseline") else OURS for name in names]
    axis.barh(names, medians, color=colors)
    axis.set(xlabel="seconds a batch, tokens")


def _digits(rows: dict[str, Any], axes: list[Axes]) -> None:
    counts = [int(n) for n in rows]
    same, classes = axes
    same.plot(counts, [1 - row["differing"] for row in rows.values()], "o-", color=OURS)
    same.axhline(0.95, color="grey", linewidth=0.8, linestyle=":")
    same.set(xlabel="iterations a scale", ylabel="same image in both caches", xticks=counts)
    for kind, color, style in (("equilibrium", OURS, "o-"), ("iterate", OTHER, "s--")):
        classes.plot(counts, [row[kind] for row in rows.values()], style, color=color, label=f"{kind} cache")
    classes.set(xlabel="iterations a scale", ylabel="class consistency", xticks=counts)
    classes.legend(frameon=False)


def _knob(rows: dict[str, Any], axes: list[Axes]) -> None:
    panels = (("images_per_second", "images/s"), ("class_consistency", "class consistency"))
    solved = {name: row for name, row in rows.items() if row["evaluations"]}
    groups = {
        "fixed": {name: row for name, row in solved.items() if not name.startswith("Adaptive")},
        "Adaptive": {name: row for name, row in solved.items() if name.startswith("Adaptive")},
    }
    for axis, (key, label) in zip(axes, panels, strict=True):
        for (name, found), color in zip(groups.items(), (OURS, OTHER), strict=True):
            points = sorted((row["evaluations"], row[key]) for row in found.values())
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=f"VIAR, {name}")
        if "VAR" in rows:
            axis.axhline(rows["VAR"][key], color=THEIRS, linestyle="--", label="VAR")
        axis.set(xlabel="evaluations of the implicit block, all scales", ylabel=label)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)


_PICTURES: dict[str, tuple[int, Callable[[Any, list[Axes]], None]]] = {
    "cache": (1, _cache),
    "speed": (1, _speed),
    "digits": (2, _digits),
    "knob": (2, _knob),
}

"""The picture of the compute knob that the demo draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import replacing

VIAR_COLOR, VAR_COLOR = "#1f6f8b", "#d1495b"


def draw_knob(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Class consistency, validation loss, images/s and cache bytes against iterations.

    Args:
        points: rows with model ("viar" or "var"), iterations (None for VAR), class_consistency,
            validation_loss, images_per_second and cache_bytes.
        path: PNG to write.
    """
    viar = [p for p in points if p["model"] == "viar"]
    (var,) = (p for p in points if p["model"] == "var")
    counts = [p["iterations"] for p in viar]
    least = min(p["class_consistency"] for p in points)
    panels: tuple[tuple[str, str, float, dict[str, float]], ...] = (
        # A little below the worst, and never so close that a tenth of a percent looks like much.
        ("class_consistency", "class consistency", 1.0, {"bottom": min(0.9, least - 0.02), "top": 1.005}),
        ("validation_loss", "validation loss, nats a token", 1.0, {}),
        ("images_per_second", "images/s", 1.0, {"bottom": 0.0}),
        ("cache_bytes", "cache, MB", 1e-6, {"bottom": 0.0}),
    )
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, label, unit, limits) in zip(axes, panels, strict=True):
        axis.plot(counts, [p[key] * unit for p in viar], "o-", color=VIAR_COLOR, label="VIAR")
        axis.axhline(var[key] * unit, color=VAR_COLOR, linestyle="--", label="VAR")
        axis.set(xlabel="iterations a scale", ylabel=label, xticks=counts)
        axis.set_ylim(**limits)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="best")
    figure.suptitle("One trained VIAR, its compute chosen at inference")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")

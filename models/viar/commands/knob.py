"""The picture of the compute knob that the demo draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing

VIAR_COLOR, VAR_COLOR = "#1f6f8b", "#d1495b"


def draw_knob(points: Sequence[dict[str, Any]], path: Path) -> None:
    """FID, class consistency, validation loss and images/s against iterations.

    Args:
        points: rows with model ("viar" or "var"), iterations (None for VAR), fid, class_consistency,
            validation_loss and images_per_second.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the picture of the knob needs the package matplotlib ({error}); pip install 'deqlib[viar]'"
        ) from error
    viar = [p for p in points if p["model"] == "viar"]
    (var,) = (p for p in points if p["model"] == "var")
    counts = [p["iterations"] for p in viar]
    least = min(p["class_consistency"] for p in points)
    panels: tuple[tuple[str, str, dict[str, float]], ...] = (
        ("fid", "FID in the judge's features", {"bottom": 0.0}),
        # A little below the worst, and never so close that a tenth of a percent looks like much.
        ("class_consistency", "class consistency", {"bottom": min(0.9, least - 0.02), "top": 1.005}),
        ("validation_loss", "validation loss, nats a token", {}),
        ("images_per_second", "images/s", {"bottom": 0.0}),
    )
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, label, limits) in zip(axes, panels, strict=True):
        axis.plot(counts, [p[key] for p in viar], "o-", color=VIAR_COLOR, label="VIAR")
        axis.axhline(var[key], color=VAR_COLOR, linestyle="--", label="VAR")
        axis.set(xlabel="iterations a scale", ylabel=label, xticks=counts)
        axis.set_ylim(**limits)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="best")
    figure.suptitle("One trained VIAR, its compute chosen at inference")
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")

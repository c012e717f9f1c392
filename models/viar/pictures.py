"""Pictures: grids of images, and the compute knob."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

VIAR_COLOR, VAR_COLOR = "#1f6f8b", "#d1495b"


def save_grid(
    images: Tensor,  # (B, 3, H, W) in [0, 1]
    path: Path,
    *,
    columns: int,
    least_side: int = 48,
) -> None:
    """Write images as one PNG, row by row, small ones enlarged to at least `least_side` pixels."""
    factor = max(1, -(-least_side // images.shape[-1]))
    images = F.interpolate(images, scale_factor=factor, mode="nearest")
    images = F.pad(images, (1, 1, 1, 1), value=1.0)
    height, width = images.shape[-2:]
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        sheet.paste(Image.fromarray(pixels), (index % columns * width, index // columns * height))
    sheet.save(path)


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
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle("One trained VIAR, its compute chosen at inference")
    figure.savefig(path, dpi=150)

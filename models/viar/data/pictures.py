"""Pictures: read and written, grids of images, edits side by side, and the compute knob."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..files import replacing
from .sources import ImageFolder

VIAR_COLOR, VAR_COLOR = "#1f6f8b", "#d1495b"


def read_picture(path: Path, side: int) -> tuple[Tensor, tuple[int, int]]:
    """A picture file as (3, side, side) in [0, 1], and the width and height the file has.

    One of side x side pixels is taken as it is; of any other the centre is cut out as `viar.data` does
    for validation.

    Raises:
        ValueError: the file is no picture.
        FileNotFoundError: there is none.
    """
    try:
        with Image.open(path) as file:
            size, pixels = file.size, np.array(file.convert("RGB"), dtype=np.float32)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that can be read; give a PNG or JPEG file") from error
    if size == (side, side):
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, size
    (image,), _ = ImageFolder([(path, 0)], side, train=False).__getitems__([0])
    return image.add(1).div(2), size


def read_mask(path: Path, side: int, size: tuple[int, int]) -> Tensor:
    """A mask (side, side) for `viar.edit` from a picture file: 1, keep, where it is lighter than mid-grey.

    It is cut as the picture of `size` (width, height) that it belongs to.

    Raises:
        ValueError: the file is no picture, or of another size.
        FileNotFoundError: there is none.
    """
    image, found = read_picture(path, side)
    if found != size:
        raise ValueError(
            f"mask: {path} has {found[0]} x {found[1]} pixels, the picture {size[0]} x {size[1]}; "
            "they must be of one size"
        )
    return (image.mean(0) > 0.5).float()


def save_picture(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) in [0, 1] as a PNG of H x W pixels of 8 bits."""
    with replacing(path) as file:
        Image.fromarray(_pixels(image)).save(file, "png")


def save_edit(
    before: Tensor,  # (3, H, W) in [0, 1]
    mask: Tensor,  # (h, w) in [0, 1], enlarged as it is
    after: Tensor,  # (B, 3, H, W) in [0, 1]
    path: Path,
) -> None:
    """Write one PNG strip: the image before, the mask (kept is white), and each result."""
    shade = F.interpolate(mask[None, None].float().cpu(), size=before.shape[-2:], mode="area")
    strip = torch.cat([before[None].cpu(), shade.expand(1, 3, -1, -1), after.cpu()])
    save_grid(strip, path, columns=len(strip))


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
        place = (index % columns * width, index // columns * height)
        sheet.paste(Image.fromarray(_pixels(image)), place)
    with replacing(path) as file:
        sheet.save(file, "png")


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
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _pixels(image: Tensor) -> np.ndarray:
    return image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()

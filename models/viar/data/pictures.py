"""Pictures: read, cut to size and written; grids of images, edits side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import replacing
from ..kinds import check_tensor, checked, shown
from .decoding import open_picture, refuse_frames, to_rgb

RESIZE = 1.125  # shorter edge before the cut, in units of the square (VAR, arXiv 2404.02905)
LARGEST_FONT = 24  # pixels, of the names of rows
LONG_STRIP = 16  # enlarged edge, in units of the square, from which on only the square is computed


@checked
def cut_square(image: Image.Image, side: int, *, at_random: bool) -> Tensor:
    """A square of a picture, (3, side, side) in [-1, 1].

    The shorter edge is brought to 1.125 times `side` (Lanczos), then the square is cut out.

    Args:
        image: of any size and mode; it is shown as a viewer does, upright and on white.
        side: pixels a side.
        at_random: where PyTorch's own generator says, else from the centre.

    Raises:
        ValueError: the image is broken, or has numbers of an unknown range.
    """
    if side < 1:
        raise ValueError(f"side: expected at least 1 pixel, got {side}")
    image = to_rgb(image, getattr(image, "filename", "") or "picture")
    scale = round(RESIZE * side) / min(image.size)
    enlarged = [max(side, round(edge * scale)) for edge in image.size]
    left, top = (int(torch.randint(e - side + 1, ())) if at_random else (e - side) // 2 for e in enlarged)
    square_of_all = (left, top, left + side, top + side)
    if max(enlarged) <= LONG_STRIP * side:
        square = image.resize((enlarged[0], enlarged[1]), Image.Resampling.LANCZOS).crop(square_of_all)
    else:  # enlarged as a whole, a line of 10,000 pixels would take a gigabyte
        across, down = (edge / large for edge, large in zip(image.size, enlarged, strict=True))
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        square = image.resize((side, side), Image.Resampling.LANCZOS, box=box)
    return _channels_first(square).contiguous() / 127.5 - 1


def fit_square(image: Image.Image, side: int) -> Tensor:
    """A picture as (3, side, side) in [0, 1]: as it is if it has this size, else the centre by `cut_square`.

    Args:
        image: of any size, in mode RGB or L.
        side: pixels a side.
    """
    if image.size == (side, side):
        return _channels_first(image.convert("RGB")) / 255
    return cut_square(image, side, at_random=False).add(1).div(2)


@checked
def read_picture(path: Path, side: int) -> tuple[Tensor, tuple[int, int]]:
    """A picture file as (3, side, side) in [0, 1], and the width and height that it has upright.

    One of side x side pixels is taken as it is; of any other the centre is cut out as `ImageFolder` does
    for validation. What is transparent is white; 16 bits, orientation, palettes and colour profiles are read
    as viewers do.

    Args:
        path: of the file.
        side: pixels a side.

    Raises:
        ValueError: the file is no picture, broken, of a kind that is not read, or holds several frames.
        FileNotFoundError: there is none.
        PermissionError: it must not be read.
    """
    with open_picture(path) as file:
        refuse_frames(file, path)
        image = to_rgb(file, path)
    return fit_square(image, side), image.size


def as_picture(image: Tensor) -> Image.Image:
    """An image as Pillow's, of H x W pixels of 8 bits in mode RGB.

    Args:
        image: shape (3, H, W) in [0, 1].
    """
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


@checked
def save_picture(image: Tensor, path: Path) -> None:
    """Write an image as a PNG of H x W pixels of 8 bits; `path` is whole or as it was.

    Args:
        image: shape (3, H, W) in [0, 1].
        path: of the file.

    Raises:
        ValueError: no picture of that shape.
    """
    _check_pictures("image", image[None])
    with replacing(path, in_turn=True) as file:
        as_picture(image).save(file, "png")


@checked
def save_edit(
    before: Tensor,  # (3, H, W) in [0, 1]
    mask: Tensor,  # (h, w) in [0, 1], enlarged as it is
    after: Tensor,  # (B, 3, H, W) in [0, 1]
    path: Path,
) -> None:
    """Write one PNG strip: the image before, the mask (kept is white), and each result.

    Args:
        before: (3, H, W) in [0, 1].
        mask: (h, w) in [0, 1].
        after: (B, 3, H, W) in [0, 1], the results.
        path: of the file.

    Raises:
        ValueError: pictures or a mask of other shapes.
    """
    check_tensor("mask", mask, has_numbers=True)
    if mask.ndim != 2:
        raise ValueError(f"mask: expected shape (h, w), got {tuple(mask.shape)}")
    _check_pictures("before", before[None])
    _check_pictures("after", after)
    if after.shape[1:] != before.shape or not mask.numel():
        raise ValueError(
            f"after, mask: expected pictures like before, {tuple(before.shape)}, and a mask of at least one "
            f"pixel, got {tuple(after.shape)} and {tuple(mask.shape)}"
        )
    shade = F.interpolate(mask[None, None].float().cpu(), size=before.shape[-2:], mode="area")
    strip = torch.cat([before[None].cpu(), shade.expand(1, 3, -1, -1), after.cpu()])
    save_grid(strip, path, columns=len(strip))


@checked
def save_grid(
    images: Tensor,  # (B, 3, H, W) in [0, 1]
    path: Path,
    *,
    columns: int,
    least_side: int = 48,
    row_names: Sequence[str] = (),
) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: (B, 3, H, W) in [0, 1].
        path: of the file.
        columns: images a row.
        least_side: smaller images are enlarged by a whole factor to at least so many pixels a side.
        row_names: written in black to the left of the rows; default nothing.

    Raises:
        ValueError: no picture, none of that shape, or no columns.
    """
    _check_pictures("images", images)
    if not len(images):
        raise ValueError(f"images: expected at least one, got {shown(images)}")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1 image a row, got {columns}")
    factor = max(1, -(-least_side // images.shape[-1]))
    images = F.interpolate(images, scale_factor=factor, mode="nearest")
    images = F.pad(images, (1, 1, 1, 1), value=1.0)
    height, width = images.shape[-2:]
    names = [_written(name, height) for name in row_names]
    margin = max((name.width for name in names), default=0)
    sheet = Image.new("RGB", (margin + columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        place = (margin + index % columns * width, index // columns * height)
        sheet.paste(as_picture(image), place)
    for row, name in enumerate(names):
        sheet.paste(name, (0, row * height))
    with replacing(path, in_turn=True) as file:
        sheet.save(file, "png")


def _check_pictures(name: str, images: Tensor) -> None:
    """Raise `ValueError` unless these are pictures of at least one pixel."""
    check_tensor(name, images, has_numbers=True)
    if images.ndim != 4 or images.shape[1] != 3 or not images.shape[2:].numel():
        raise ValueError(f"{name}: expected pictures of shape (3, H, W) in [0, 1], got {shown(images)}")
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected floating point in [0, 1], got {images.dtype}")


def _written(text: str, height: int) -> Image.Image:
    """A line of text, black on white, in the middle of that height."""
    font = ImageFont.load_default(min(height // 4, LARGEST_FONT))
    strip = Image.new("RGB", (round(font.getlength(text)) + height // 4, height), "white")
    ImageDraw.Draw(strip).text((strip.width // 2, height // 2), text, fill="black", font=font, anchor="mm")
    return strip


def _channels_first(image: Image.Image) -> Tensor:
    """Pixels of an RGB picture, (3, H, W) float32 in [0, 255]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)

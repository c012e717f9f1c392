"""Pictures: read, cut to size and written; grids of images, edits side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..files import replacing

RESIZE = 1.125  # shorter edge before the cut, in units of the square (VAR, arXiv 2404.02905)


def cut_square(image: Image.Image, side: int, *, at_random: bool) -> Tensor:
    """A square of a picture, (3, side, side) in [-1, 1].

    The shorter edge is brought to 1.125 times `side` (Lanczos), then the square is cut out.

    Args:
        image: of any size and mode.
        side: pixels a side.
        at_random: where PyTorch's own generator says, else from the centre.
    """
    image = image.convert("RGB")
    scale = round(RESIZE * side) / min(image.size)
    width, height = (max(side, round(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    room = (width - side, height - side)
    left, top = (int(torch.randint(r + 1, ())) if at_random else r // 2 for r in room)
    square = image.crop((left, top, left + side, top + side))
    return _channels_first(square).contiguous() / 127.5 - 1


def read_picture(path: Path, side: int) -> tuple[Tensor, tuple[int, int]]:
    """A picture file as (3, side, side) in [0, 1], and the width and height the file has.

    One of side x side pixels is taken as it is; of any other the centre is cut out as `ImageFolder` does
    for validation.

    Args:
        path: of the file.
        side: pixels a side.

    Raises:
        ValueError: the file is no picture.
        FileNotFoundError: there is none.
    """
    try:
        with Image.open(path) as file:
            if file.size == (side, side):
                return _channels_first(file.convert("RGB")) / 255, file.size
            return cut_square(file, side, at_random=False).add(1).div(2), file.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that can be read; give a PNG or JPEG file") from error


def read_mask(path: Path, side: int, size: tuple[int, int]) -> Tensor:
    """A mask (side, side) for `viar.edit` from a picture file: 1, keep, where it is lighter than mid-grey.

    It is cut as the picture that it belongs to.

    Args:
        path: of the file.
        side: pixels a side.
        size: width and height of the picture that it belongs to.

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
    """Write an image as a PNG of H x W pixels of 8 bits; `path` is whole or as it was.

    Args:
        image: shape (3, H, W) in [0, 1].
        path: of the file.
    """
    with replacing(path) as file:
        Image.fromarray(_pixels(image)).save(file, "png")


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
    """
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
    """Write images as one PNG, row by row.

    Args:
        images: (B, 3, H, W) in [0, 1].
        path: of the file.
        columns: images a row.
        least_side: smaller images are enlarged by a whole factor to at least so many pixels a side.
    """
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


def _channels_first(image: Image.Image) -> Tensor:
    """Pixels of an RGB picture, (3, H, W) float32 in [0, 255]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """An image (3, H, W) in [0, 1] as Pillow takes it, (H, W, 3) of 8 bits."""
    return image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()

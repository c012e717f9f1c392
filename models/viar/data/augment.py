"""Changed versions of images that are held in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dataset import TensorImages


def augmented(data: TensorImages, copies: int) -> TensorImages:
    """`data` and `copies` slightly changed versions of each image, always the same ones.

    A version is turned by up to 8 degrees, sheared and scaled by up to a tenth, and shifted by up to 5 %
    of its side.

    Args:
        data: N images.
        copies: at least 0.

    Returns:
        (1 + copies) N images: those of `data`, then every version of all of them in turn.
    """
    generator = torch.Generator().manual_seed(0)
    versions = [data.images]
    for _ in range(copies):
        turn, shear, scale, right, down = torch.rand(5, len(data), generator=generator) * 2 - 1
        turn, shear, scale = turn * (8 * torch.pi / 180), shear * 0.1, 1 + scale * 0.1
        rows = [
            torch.stack([turn.cos() * scale, shear - turn.sin() * scale, right * 0.1], 1),
            torch.stack([turn.sin() * scale, turn.cos() * scale, down * 0.1], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(data.images.shape), align_corners=False)
        versions.append(F.grid_sample(data.images, grid, padding_mode="border", align_corners=False))
    return TensorImages(torch.cat(versions), data.labels.repeat(copies + 1))

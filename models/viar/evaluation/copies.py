"""Whether images are copies: how far each is from its nearest training picture."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import check_tensor, checked

BLOCK = 1024  # images and pictures that are compared at a time


@checked
def nearest_distances(
    images: Tensor,  # (B, 3, H, W)
    reference: Tensor,  # (N, 3, H, W)
) -> Tensor:
    """L2 distance of each image to the nearest one of `reference`, over all its pixels and channels, (B,).

    Args:
        images: (B, 3, H, W) in any range.
        reference: (N, 3, H, W) in the same range, N at least 1.

    Returns:
        (B,) float32, on the device of `images`; of one pixel that is 1 apart in one channel it is 1.

    Raises:
        ValueError: images of another size, or no reference.
    """
    for name, pictures in (("images", images), ("reference", reference)):
        check_tensor(name, pictures, has_numbers=True)
        if pictures.ndim < 2:
            raise ValueError(f"{name}: expected shape (B, 3, H, W), got {tuple(pictures.shape)}")
    if images.shape[1:] != reference.shape[1:] or not len(reference):
        raise ValueError(
            f"reference: expected pictures of the images' shape {tuple(images.shape[1:])}, at least one, got "
            f"shape {tuple(reference.shape)}"
        )
    reference = reference.to(images.device, torch.float32).flatten(1)
    parts = [_nearest(rows, reference) for rows in torch.split(images.float().flatten(1), BLOCK)]
    return torch.cat(parts) if parts else images.new_empty(0, dtype=torch.float32)


def _nearest(rows: Tensor, reference: Tensor) -> Tensor:
    """Distance of each row to the nearest row of `reference`."""
    blocks = [torch.cdist(rows, others).min(1) for others in torch.split(reference, BLOCK)]
    first = torch.stack([block.values for block in blocks]).argmin(0)
    index = torch.stack([block.indices for block in blocks]).gather(0, first[None])[0] + first * BLOCK
    # That of the nearest one anew: of a copy, rounding of large products would leave more than 0.
    distances_B: Tensor = torch.linalg.vector_norm(rows - reference[index], dim=1)
    return distances_B


@checked
@torch.no_grad()
def memorisation(
    images: Tensor,  # (B, 3, H, W)
    training: Tensor,  # (N, 3, H, W)
    held_out: Tensor,  # (M, 3, H, W)
) -> float:
    """Median distance of images to the nearest training picture, over that of held-out pictures.

    About 1 for images that are new as held-out pictures are, towards 0 for copies of training pictures.

    Args:
        images: (B, 3, H, W) generated, B at least 1.
        training: (N, 3, H, W) that the model has learnt from, in the same range.
        held_out: (M, 3, H, W) that it has not, in the same range, M at least 1.

    Raises:
        ValueError: other sizes, no images, or held-out pictures half of which are training pictures.
    """
    distances, others = nearest_distances(images, training), nearest_distances(held_out, training)
    if not len(distances) or not len(others):
        raise ValueError(
            f"images, held_out: expected at least one of each, got {len(distances)} and {len(others)}"
        )
    return median_ratio(distances, others)


def median_ratio(distances: Tensor, held_out: Tensor) -> float:
    """Median of distances to the nearest training picture over that of held-out pictures.

    Args:
        distances: (B,) of images.
        held_out: (M,) of held-out pictures.

    Raises:
        ValueError: the median of held-out pictures is 0.
    """
    scale = float(held_out.median())
    if not scale:
        raise ValueError(
            "held_out: expected pictures that training does not have, but half of them and more are there"
        )
    return float(distances.median()) / scale

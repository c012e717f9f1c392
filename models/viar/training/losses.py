"""How far a reconstruction is from its image, for training the tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

EDGE_LEVELS = 3  # full resolution, half and a quarter


def _edges(images: Tensor, reconstruction: Tensor) -> Tensor:
    # The sharp changes that a mean pixel error hardly notices, at several resolutions. Differences are
    # linear, so those of the error are the error of those.
    error = reconstruction - images
    total = error.new_zeros(())
    for _ in range(EDGE_LEVELS):
        if min(error.shape[-2:]) < 2:
            break
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / EDGE_LEVELS


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "edges": _edges}


def reconstruction_loss(images: Tensor, reconstruction: Tensor, kind: str = "l1+l2") -> Tensor:
    """Scalar loss between images (B, 3, H, W) and their reconstruction, the mean over all pixels.

    Args:
        images: in [-1, 1].
        reconstruction: not clamped, so that pixels out of range still have a gradient.
        kind: terms joined by "+", each with weight 1: "l1" mean absolute error, "l2" mean squared error,
            "edges" mean absolute error of the differences between neighbouring pixels, averaged over
            full, half and quarter resolution.

    Raises:
        ValueError: the shapes differ or a term of `kind` is unknown.
    """
    terms = kind.split("+")
    if unknown := [term for term in terms if term not in TERMS]:
        raise ValueError(f"kind must be terms out of {list(TERMS)} joined by '+', got {unknown} in {kind!r}")
    if images.shape != reconstruction.shape:
        raise ValueError(
            f"reconstruction must have the shape of images, {tuple(images.shape)}, "
            f"got {tuple(reconstruction.shape)}"
        )
    losses = [TERMS[term](images, reconstruction.float()) for term in terms]
    return sum(losses[1:], start=losses[0])

"""The ladder of token maps: where each scale sits in a sequence, computed in one place.

Shape letters used in this package: B batch, K scales of side p_1 < ... < p_K, L = sum of p_k squared
(tokens of all scales), C width, H heads, V codebook size, Z code channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def check_sides(owner: str, sides: Sequence[int]) -> None:
    """Raise `ValueError` unless `sides` is a non-empty, strictly rising sequence of positive integers."""
    if not sides or min(sides) < 1 or any(a >= b for a, b in pairwise(sides)):
        raise ValueError(f"{owner}: sides must be positive and strictly rising, got {tuple(sides)}")


def scale_slices(sides: Sequence[int]) -> list[slice]:
    """Where each scale's tokens lie in the sequence of all scales."""
    ends = list(accumulate(side * side for side in sides))
    return [slice(end - side * side, end) for side, end in zip(sides, ends, strict=True)]


def scale_ids(sides: Sequence[int]) -> Tensor:
    """0-based scale of every token, shape (L,)."""
    return torch.cat([torch.full((side * side,), scale) for scale, side in enumerate(sides)])


def block_causal_mask(sides: Sequence[int]) -> Tensor:
    """Boolean (L, L), true where the token of the row may attend to the token of the column.

    A token sees its own scale and all earlier ones.
    """
    ids = scale_ids(sides)
    return ids[:, None] >= ids[None, :]


def resize_tokens(x_BLC: Tensor, side: int) -> Tensor:
    """A map of tokens (B, p * p, C) at another side, (B, side * side, C), bilinear."""
    old = math.isqrt(x_BLC.shape[1])
    x_BChw = torch.unflatten(x_BLC.transpose(1, 2), 2, (old, old))
    resized = F.interpolate(x_BChw, size=(side, side), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)

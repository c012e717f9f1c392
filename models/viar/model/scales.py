"""The ladder of token maps: where each scale sits in a sequence and what it sees, computed in one place.

Shape letters used in this package: B batch, K scales of side p_1 < ... < p_K, L = sum of p_k squared
(tokens of all scales), C width, H heads, V codebook size, Z code channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import checked

# Tokens from which on a scale attends by itself. What that saves grows with the tokens of the scale, what it
# costs does not: another call of the kernel, another gradient of keys and values to add up. On CPUs scales of
# 36 to 100 tokens took the same time either way, in models of width 64 as of width 384; smaller ones were
# slower alone, larger ones faster.
MIN_TOKENS_ALONE = 100


class BlockCausal(NamedTuple):
    """How tokens of all scales attend at once, each to its own scale and all earlier ones.

    The sequence is cut into groups, and the queries of a group meet keys and values up to its end. Within a
    group of one scale everything is seen, so it needs no mask. Nothing is computed to be thrown away then, as
    a third of everything is under a mask (L, L) at 256 and 512 pixels, and kernels that take no mask can be
    used, such as flash attention on GPUs. The small scales at the beginning are one group under a small mask.

    Attributes:
        sizes: tokens of each group, L in all.
        mask_ll: within the first group, true where the token of the row may attend to that of the column;
            `None`: everywhere.
    """

    sizes: tuple[int, ...]
    mask_ll: Tensor | None


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


@checked
def block_causal_mask(sides: Sequence[int]) -> Tensor:
    """Boolean (L, L), true where the token of the row may attend to the token of the column.

    A token sees its own scale and all earlier ones.

    Raises:
        ValueError: no sides, or one below 1.
    """
    if not len(sides) or min(sides) < 1:
        raise ValueError(f"sides: expected at least one, each at least 1, got {tuple(sides)}")
    ids = scale_ids(sides)
    return ids[:, None] >= ids[None, :]


@checked
def block_causal(sides: Sequence[int]) -> BlockCausal:
    """Scales of at least `MIN_TOKENS_ALONE` tokens by themselves, the smaller ones before them together.

    The rule is the same on every device: another group is some more kernels on a GPU too, and what needs a
    mask there is the smallest part.

    Args:
        sides: of the scales, rising.

    Raises:
        ValueError: no sides, or one below 1.
    """
    if not len(sides) or min(sides) < 1:
        raise ValueError(f"sides: expected at least one, each at least 1, got {tuple(sides)}")
    small = list(takewhile(lambda side: side * side < MIN_TOKENS_ALONE, sides))
    first = small or sides[:1]
    sizes = [side * side for side in sides[len(first) :]]
    mask_ll = block_causal_mask(first) if len(first) > 1 else None
    return BlockCausal((sum(side * side for side in first), *sizes), mask_ll)


def resize_tokens(x_BLC: Tensor, side: int) -> Tensor:
    """A map of tokens (B, p * p, C) at another side, (B, side * side, C), bilinear."""
    old = math.isqrt(x_BLC.shape[1])
    x_BChw = torch.unflatten(x_BLC.transpose(1, 2), 2, (old, old))
    resized = F.interpolate(x_BChw, size=(side, side), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)

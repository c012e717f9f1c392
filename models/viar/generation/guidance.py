"""Classifier-free guidance, stronger from scale to scale.

At scale k of K, with t = cfg k / (K - 1), the head gets

    h = h_class + t (h_class - h_null) = (1 + t) h_class - t h_null

of what the transformer computes for the class and for no class. The head is linear, so guiding what it takes
guides the logits, at half the work. (Ho & Salimans 2022, arXiv 2207.12598; the ramp: VAR, arXiv 2404.02905.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.scales import resize_tokens


class Guidance:
    """Guides one generation; its batch holds the images twice, with their class first, then with none.

    Args:
        strength: t at the last scale; 0 switches guidance off, and nothing is computed twice.
        sides: of the scales, p_1 < ... < p_K.
        num_images: B.
        reuse: so many of the last scales are computed with their class alone; the direction
            h_class - h_null is that of the scale before them, enlarged.
    """

    def __init__(self, strength: float, sides: Sequence[int], num_images: int, *, reuse: int = 0) -> None:
        self._strength, self._sides, self._num_images = strength, sides, num_images
        self._first_reusing = len(sides) - reuse
        self._reuses = reuse > 0
        self._direction_BlC: Tensor | None = None

    def labels(self, labels_B: Tensor, null_class: int) -> Tensor:
        """Classes of the batch: (2 B,), or (B,) without guidance."""
        if not self._strength:
            return labels_B
        return torch.cat([labels_B, torch.full_like(labels_B, null_class)])

    def num_samples(self, scale: int) -> int:
        """How many samples of the batch, from its beginning, are computed at a scale."""
        alone = not self._strength or scale >= self._first_reusing
        return self._num_images if alone else 2 * self._num_images

    def guide(
        self,
        scale: int,
        hidden: Tensor,  # (`num_samples(scale)`, l, C), what the head takes
    ) -> Tensor:
        """(B, l, C), guided."""
        if not self._strength:
            return hidden
        strength = self._strength * guidance_ramp(scale, len(self._sides))
        if scale >= self._first_reusing:
            assert self._direction_BlC is not None  # the first scale never reuses
            self._direction_BlC = resize_tokens(self._direction_BlC, self._sides[scale])
            return hidden + strength * self._direction_BlC
        cond, null = hidden.chunk(2)
        if self._reuses:
            self._direction_BlC = cond - null
        return torch.lerp(null, cond, 1 + strength) if strength else cond


def guidance_ramp(scale: int, num_scales: int) -> float:
    """Share of the guidance at a scale: linear from 0 to 1; 1 where there is one scale only."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0

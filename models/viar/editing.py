"""In-painting, out-painting and class-conditional editing with the sampler of `viar.sampling`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .iterations import Iterations
from .sampling import decode_images, sample_tokens
from .tokenizer import Tokenizer
from .transformer import NextScaleTransformer

COARSE_TOKENS = 3  # a scale of at most so many tokens is kept whole: it holds the layout of the image


@torch.no_grad()
def edit(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    images: Tensor,
    mask: Tensor,
    labels: Tensor | Sequence[int],
    *,
    iterations: Iterations | None = None,
    cfg: float = 1.5,
    top_k: int | None = 900,
    top_p: float | None = 0.96,
    seed: int = 0,
    first_index: int = 0,
    cache: str = "equilibrium",
) -> Tensor:
    """Regenerate the part of images where `mask` is 0, keeping the rest.

    At each scale the mask is resized and, where above a half, the image's own codes replace the sampled
    ones; scales of at most 3 tokens are kept whole. The kept region is as good as its tokens: pixels
    there are close to the tokenizer's reconstruction. (VAR, arXiv 2404.02905, zero-shot editing.)

    Args:
        model: VAR or VIAR, of the tokenizer's sizes.
        tokenizer: encodes the images and decodes the result.
        images: (B, 3, H, W) in [0, 1].
        mask: (h, w), or (B, h, w) with a mask an image; any resolution; 1 keeps, 0 regenerates.
        labels: (B,) classes that guide the regenerated part.
        iterations, cfg, top_k, top_p, seed, first_index, cache: see `viar.generate`.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: an argument of the wrong shape or out of range.
    """
    if images.is_floating_point() and images.numel() and not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(
            f"images: expected values in [0, 1], got {float(images.min()):.3g} to {float(images.max()):.3g}"
        )
    tokens = tokenizer.encode(images * 2 - 1)
    keep_B1hw = _check_mask(mask, len(images)).to(images.device, torch.float32)
    labels = torch.as_tensor(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(images)},), one an image, got {tuple(labels.shape)}")

    def keep_own_codes(scale: int, sampled: Tensor) -> Tensor:
        side = sampled.shape[-1]
        own = tokenizer.quantizer.embed(tokens[scale])
        if side * side <= COARSE_TOKENS:
            return own
        keep = F.interpolate(keep_B1hw, size=(side, side), mode="bilinear", align_corners=False) > 0.5
        return torch.where(keep, own, sampled)

    sample = sample_tokens(
        model,
        tokenizer,
        labels,
        iterations=iterations,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        first_index=first_index,
        cache=cache,
        replace=keep_own_codes,
    )
    return decode_images(tokenizer, sample)


def _check_mask(mask: Tensor, batch: int) -> Tensor:
    """The mask as (B or 1, 1, h, w)."""
    if mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if mask.dim() != 3 or mask.shape[0] not in (1, batch) or not mask.numel():
        raise ValueError(f"mask: expected shape (h, w) or ({batch}, h, w), got {tuple(mask.shape)}")
    if not 0 <= mask.min() <= mask.max() <= 1:
        raise ValueError(
            f"mask: expected values in [0, 1], got {float(mask.min()):.3g} to {float(mask.max()):.3g}"
        )
    return mask.unsqueeze(1)

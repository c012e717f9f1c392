"""In-painting, out-painting and class-conditional editing with the sampler of `viar.generation.sampling`.

Two ways of keeping a region. "codes" is the published one: the image's own codes take the place of sampled
ones. They stand for the region only roughly, and those near the border, and all coarse ones, know what the
hidden pixels were. "features" asks at every scale what the kept pixels mean beside what was made so far:
the picture so far is decoded, the kept pixels are put into it, and its encoding is held in the kept region.
In the end the kept pixels themselves are put back. Hidden pixels are never looked at.

Shape letters: B images, Z code channels, P = p_K side of the last scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import check_kind, check_tensor, checked
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .sampling import decode_images, sample_tokens
from .scalewise import Hold, Replace
from .settings import Sampling, as_labels

COARSE_TOKENS = 3  # "codes": a scale of at most so many tokens is kept whole, as published
KEEPS = ("features", "codes")
MOST_SIDE = 32_768  # of a mask: nobody has larger pictures


@torch.no_grad()
def edit(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    images: Tensor,
    mask: Tensor,
    labels: Tensor | Sequence[int],
    *,
    sampling: Sampling | None = None,
    first_index: int = 0,
    keep: str = "features",
    border: int | None = None,
) -> Tensor:
    """Regenerate the part of images where `mask` is 0, keeping the rest.

    With `keep="features"` the result does not depend on the regenerated pixels of `images`; pixels further
    than `border` from them come back as they were, bit by bit; those nearer pass smoothly into the
    regenerated part, which itself holds nothing of the old pixels. A mask of zeros is `generate`. Each scale
    costs a call of the tokenizer's decoder and one of its encoder. The host waits for the device before the
    first scale, to look at picture and mask, and not again.

    With `keep="codes"`, VAR's zero-shot editing (arXiv 2404.02905): at each scale the mask is resized
    bilinearly and where it is above a half the image's own codes replace the sampled ones; scales of at
    most 3 tokens are kept whole. The whole picture comes out of the decoder, so kept pixels are only close
    to what they were, and hidden ones shine through.

    Args:
        model: VAR or VIAR, of the tokenizer's sizes.
        tokenizer: encodes the images and decodes the result.
        images: (B, 3, H, W) floating point in [0, 1].
        mask: (h, w), or (B, h, w) with a mask an image; any resolution and type, values in [0, 1]: 1 keeps,
            0 regenerates. With "features" a pixel is kept where the mask, averaged over it, is above a half.
        labels: (B,) classes in [0, N] that guide the regenerated part; N asks for no class in particular.
        keep: "features" or "codes", see above.
        border: of "features": pixels over which the kept side passes into the regenerated part; 0 cuts
            hard. Default half a token, at least 1. A token is H / p_K pixels.
        sampling: how to sample the regenerated part; default `Sampling()`.
        first_index: index of the first image, to edit a series in several calls.

    Returns:
        (B, 3, H, W) in [0, 1], of the type of `images`.

    Raises:
        ValueError: an argument of the wrong shape or out of range, or a border with `keep="codes"`.
    """
    check_kind("tokenizer: expected", tokenizer, Tokenizer)
    for name, value in (("images", images), ("mask", mask)):
        check_tensor(name, value, has_numbers=True)
    check_kind("keep: expected", keep, str)
    check_kind("border: expected", border, int | None)
    labels = as_labels(labels)
    _check_images(images, labels, tokenizer.config.image_side)
    token = images.shape[-1] // tokenizer.config.sides[-1]
    border = _check_keep(keep, border, default=max(1, token // 2))
    mask_B1hw = _check_mask(mask, len(images)).to(images.device, torch.float32)
    kept_B1HW = F.interpolate(mask_B1hw, size=images.shape[-2:], mode="area") > 0.5
    holds = keep == "features" and bool(kept_B1HW.any())
    own = images.to(tokenizer.quantizer.codebook.weight.dtype)
    sample = sample_tokens(
        model,
        tokenizer,
        labels,
        sampling,
        first_index=first_index,
        replace=_own_codes(tokenizer, own, mask_B1hw) if keep == "codes" else None,
        hold=_own_features(tokenizer, own, kept_B1HW) if holds else None,
    )
    made = decode_images(tokenizer, sample).to(images.dtype)
    if keep == "codes":
        return made
    # lerp is exact at both ends: the very pixels that were, the very pixels that were made.
    return images.lerp(made, made_share(kept_B1HW, border).to(images.dtype))


@checked
def box_mask(
    box: Sequence[float],  # top, left, bottom, right as fractions of the picture
    side: int,
) -> Tensor:
    """Mask (side, side) for `edit`: 0 where a pixel's centre is inside the box, else 1.

    Raises:
        ValueError: not four fractions with top < bottom and left < right, or a box that holds no pixel.
    """
    if not 1 <= side <= MOST_SIDE:
        raise ValueError(f"side: expected 1 to {MOST_SIDE:,} pixels, got {side}")
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(
            "box: expected fractions (top, left, bottom, right) in [0, 1], top < bottom and left < "
            f"right, got {tuple(box)}"
        )
    top, left, bottom, right = box
    centres = (torch.arange(side) + 0.5) / side
    rows, columns = (centres >= top) & (centres < bottom), (centres >= left) & (centres < right)
    if not (rows.any() and columns.any()):
        raise ValueError(f"box: {tuple(box)} holds no pixel of a picture of side {side}; make it larger")
    return 1 - torch.outer(rows.float(), columns.float())


def made_share(kept_B1HW: Tensor, border: int) -> Tensor:
    """How much of each pixel is new, (B, 1, H, W): 1 where not kept, falling to 0 beyond `border`.

    Over the kept side it falls linearly with the distance, the larger one of rows and columns.
    """
    near = 1 - kept_B1HW.float()
    share = near.clone()
    for distance in range(1, min(border, max(kept_B1HW.shape[-2:])) + 1):  # beyond, all is near
        near = F.max_pool2d(near, 3, stride=1, padding=1)
        share = share.maximum(near * (1 - distance / (border + 1)))
    return share


def _own_codes(tokenizer: Tokenizer, images: Tensor, mask_B1hw: Tensor) -> Replace:
    tokens = tokenizer.encode(images * 2 - 1)

    def replace(scale: int, sampled: Tensor) -> Tensor:
        side = sampled.shape[-1]
        own = tokenizer.quantizer.embed(tokens[scale])
        if side * side <= COARSE_TOKENS:
            return own
        keep = F.interpolate(mask_B1hw, size=(side, side), mode="bilinear", align_corners=False) > 0.5
        return torch.where(keep, own, sampled)

    return replace


def _own_features(tokenizer: Tokenizer, images: Tensor, kept_B1HW: Tensor) -> Hold:
    sides, quantizer = tokenizer.config.sides, tokenizer.quantizer
    share_B1PP = F.interpolate(kept_B1HW.float(), size=(sides[-1], sides[-1]), mode="area")

    def hold(scale: int, f_hat: Tensor) -> Tensor:
        # The encoder sees the whole picture from every position. Put into what was made so far, the kept
        # pixels have features that fit their new surroundings; beside a plain colour in the hole, they
        # would tell the model that the hole is plain.
        picture = torch.where(kept_B1HW, images * 2 - 1, tokenizer.decode_f_hat(f_hat))
        own = tokenizer.features(picture)
        if scale < len(sides) - 1:  # the model is used to what codes can say; the decoder takes it all
            own = quantizer.decode_tokens(quantizer.encode(own)[: scale + 1])
        return f_hat.lerp(own, share_B1PP)

    return hold


def _check_images(images: Tensor, labels: Tensor, side: int) -> None:
    if tuple(images.shape[1:]) != (3, side, side) or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point of shape (B, 3, {side}, {side}), "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if images.numel():
        _check_values("images", images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(images)},), one an image, got {tuple(labels.shape)}")


def _check_keep(keep: str, border: int | None, *, default: int) -> int:
    """The border in pixels."""
    if keep not in KEEPS:
        raise ValueError(f"keep: expected one of {list(KEEPS)}, got {keep!r}")
    if keep == "codes" and border is not None:
        raise ValueError(f"border: keep='codes' blends nothing, so expected None, got {border}")
    if border is not None and border < 0:
        raise ValueError(f"border: expected at least 0 pixels, got {border}")
    return default if border is None else border


def _check_mask(mask: Tensor, batch: int) -> Tensor:
    """The mask as (B or 1, 1, h, w)."""
    if mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if mask.dim() != 3 or mask.shape[0] not in (1, batch) or not mask.numel():
        raise ValueError(f"mask: expected shape (h, w) or ({batch}, h, w), got {tuple(mask.shape)}")
    _check_values("mask", mask)
    return mask.unsqueeze(1)


def _check_values(name: str, values: Tensor) -> None:
    check_tensor(name, values, has_numbers=True)
    low, high = torch.stack(values.aminmax()).tolist()  # both by one wait for the device
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name}: expected values in [0, 1], got {low:.3g} to {high:.3g}")

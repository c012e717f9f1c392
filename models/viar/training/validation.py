"""What training measures of held-out images."""

from __future__ import annotations

import torch

from ..data import Batch, BatchedDataset, all_batches
from ..tokenizer import Tokenizer
from ..tokenizer.reconstruction import psnr, ssim


@torch.no_grad()
def tokenizer_validation(
    model: Tokenizer, data: BatchedDataset[Batch], *, batch_size: int = 256
) -> dict[str, float]:
    """How close held-out images come back from their tokens, in evaluation mode.

    Args:
        model: left in the mode it was in.
        data: images (B, 3, H, W) in [-1, 1].
        batch_size: images at a time; has no influence.

    Returns:
        Means over the images: "loss", the mean squared error of pixels in [-1, 1], "psnr" in dB and "ssim".

    Raises:
        ValueError: no images, or images of another size.
    """
    if not len(data):
        raise ValueError("data: expected at least 1 image to reconstruct, got 0")
    device, training = model.quantizer.codebook.weight.device, model.training
    total = torch.zeros(3, dtype=torch.float64)
    model.eval()
    for batch, _ in all_batches(data, batch_size):
        images = batch.to(device)
        made = model.decode(model.encode(images))
        error = (images - made).square().mean((1, 2, 3))
        total += torch.stack([error, psnr(images, made), ssim(images, made)]).double().sum(1).cpu()
    model.train(training)
    return dict(zip(("loss", "psnr", "ssim"), (total / len(data)).tolist(), strict=True))

"""What training measures of held-out images."""

from __future__ import annotations

import torch
from torch import Tensor

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
        numbers = reconstruction_numbers(model, batch.to(device))
        total += torch.stack(list(numbers.values())).double().sum(1).cpu()
    model.train(training)
    return dict(zip(numbers, (total / len(data)).tolist(), strict=True))


def reconstruction_numbers(model: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """Of each image, (B,): "loss", the mean squared error of its pixels, "psnr" in dB and "ssim".

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
    """
    made = model.decode(model.encode(images))
    error = (images - made).square().mean((1, 2, 3))
    return {"loss": error, "psnr": psnr(images, made), "ssim": ssim(images, made)}

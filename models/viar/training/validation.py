"""What training measures of held-out images."""

from __future__ import annotations

from ..data import Batch, BatchedDataset
from ..kinds import checked
from ..tokenizer import Tokenizer
from .held_out import HeldOut, measured, tokenizer_measure


@checked
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
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 image at a time, got {batch_size}")
    training = model.training
    model.eval()
    numbers = measured(
        model,
        HeldOut(data, tokenizer_measure),
        batch_size=batch_size,
        workers=0,
        device=model.quantizer.codebook.weight.device,
        together=None,
    )
    model.train(training)
    return numbers

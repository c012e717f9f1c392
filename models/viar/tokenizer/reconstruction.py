"""How close a reconstruction is to its image: PSNR, and SSIM (Wang et al. 2004, IEEE TIP 13(4)).

Both compare images in [-1, 1] channel by channel and give one number an image, (B,). Shape letters: B batch,
C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import checked

RANGE = 2.0  # from the darkest pixel, -1, to the brightest, 1
WINDOW, DEVIATION = 11, 1.5  # pixels: side of SSIM's window, standard deviation of its Gaussian weights
K_LUMINANCE, K_CONTRAST = 0.01, 0.03  # SSIM's constants, for pixels in [0, 1]


@checked
def psnr(
    images_BCHW: Tensor,  # in [-1, 1]
    reconstruction_BCHW: Tensor,
) -> Tensor:
    """Peak signal to noise ratio of each image in dB, (B,): 10 log10(range^2 / mean squared error).

    Infinite for an image that is met exactly. The mean over images is not the ratio of the mean error, which
    is lower.

    Raises:
        ValueError: the shapes differ or are not (B, C, H, W).
    """
    _check(images_BCHW, reconstruction_BCHW)
    error_B = (images_BCHW - reconstruction_BCHW).float().square().mean((1, 2, 3))
    return 10 * torch.log10(RANGE**2 / error_B)


@checked
def ssim(
    images_BCHW: Tensor,  # in [-1, 1]
    reconstruction_BCHW: Tensor,
) -> Tensor:
    """Structural similarity of each image, (B,), in [-1, 1]; 1 for an image that is met exactly.

    Means, variances and covariance of pixels in [0, 1] are taken in Gaussian windows of 11 pixels (standard
    deviation 1.5) that lie wholly in the image, and the index is averaged over windows and channels. Images
    of less than 11 pixels a side have a window of the largest odd side that they hold.

    Raises:
        ValueError: the shapes differ or are not (B, C, H, W).
    """
    _check(images_BCHW, reconstruction_BCHW)
    shorter = min(images_BCHW.shape[-2:])
    window = _window(min(WINDOW, shorter - 1 + shorter % 2), images_BCHW.device)
    # Brightness is compared by ratio, so black has to be 0. One convolution for all five; variances are
    # differences of squares, for which float32 would be coarse.
    both = (pixels.double().flatten(0, 1).unsqueeze(1) for pixels in (images_BCHW, reconstruction_BCHW))
    x, y = ((pixels + 1) / 2 for pixels in both)
    means = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window).chunk(5)
    mean_x, mean_y = means[:2]
    variance_x, variance_y, covariance = (
        means[2] - mean_x**2,
        means[3] - mean_y**2,
        means[4] - mean_x * mean_y,
    )
    c1, c2 = K_LUMINANCE**2, K_CONTRAST**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index = index / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return index.view(*images_BCHW.shape[:2], -1).mean((1, 2)).float()


def _window(side: int, device: torch.device) -> Tensor:
    """Gaussian weights that add up to 1, (1, 1, side, side) float64."""
    offsets = torch.arange(side, dtype=torch.float64, device=device) - side // 2
    line = torch.exp(-offsets.square() / (2 * DEVIATION**2))
    square = torch.outer(line, line)
    return (square / square.sum())[None, None]


def _check(images: Tensor, reconstruction: Tensor) -> None:
    if not images.is_floating_point() or not reconstruction.is_floating_point():
        raise ValueError(f"images: expected floating point, got {images.dtype} and {reconstruction.dtype}")
    if images.device != reconstruction.device:
        raise ValueError(f"images: expected one device, got {images.device} and {reconstruction.device}")
    if not images.numel():
        raise ValueError(f"images: expected pixels, got none: {tuple(images.shape)}")
    if images.ndim != 4 or images.shape != reconstruction.shape:
        raise ValueError(
            f"reconstruction must have the shape (B, C, H, W) of images, got {tuple(reconstruction.shape)} "
            f"with images {tuple(images.shape)}"
        )

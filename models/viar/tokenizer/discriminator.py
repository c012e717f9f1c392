"""PatchGAN discriminator (arXiv 1611.07004), which tells pictures from reconstructions patch by patch.

It is that of VQGAN (arXiv 2012.09841) with one exception: GroupNorm in the place of BatchNorm. Statistics of
a batch would make the answer for a picture depend on those beside it, mix real and made ones, and differ
between processes that train together; those of a single picture do none of this, and are the same however
many processes there are.

Shape letters: B batch, H W pixels, h w patches.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..kinds import checked
from ..model.config import check_at_least

MOST_LAYERS, MOST_WIDENING = 3, 8  # of the published network
MOST_GROUPS, LEAST_CHANNELS = 32, 4  # of a norm, and in each of its groups
INIT_STD = 0.02


def patch_side(num_layers: int) -> int:
    """Pixels a side that one answer looks at, norms aside: 16, 34 and 70 for 1, 2 and 3 layers."""
    side = 1
    for stride in (1, 1, *[2] * num_layers):  # from the answer back to the pixels
        side = (side - 1) * stride + 4
    return side


class Discriminator(nn.Module):
    """Images (B, 3, H, W) to a logit for each of many overlapping patches, (B, 1, h, w): high for real ones.

    `num_layers` convolutions of stride 2, each with twice the channels of the one before up to 8 times the
    first's, then two of stride 1, all 4 x 4 and with a leaky ReLU of slope 0.2 between them. Weights of
    convolutions start normal with standard deviation 0.02, biases at 0.

    Args:
        image_side: pixels a side.
        num_layers: convolutions of stride 2; default the most, up to the published 3, whose patches
            (`patch_side`) are no larger than the picture, and at least 1.
        base_channels: of the first convolution.

    Raises:
        ValueError: the picture is too small for the layers, or a number is below 1.
    """

    @checked
    def __init__(self, image_side: int, *, num_layers: int | None = None, base_channels: int = 64) -> None:
        super().__init__()
        if num_layers is None:
            num_layers = max(n for n in range(1, MOST_LAYERS + 1) if n == 1 or patch_side(n) <= image_side)
        check_at_least("Discriminator", 1, num_layers=num_layers, base_channels=base_channels)
        if image_side >> num_layers < 3:
            raise ValueError(
                f"Discriminator: num_layers={num_layers} needs pictures of at least {3 << num_layers} pixels "
                f"a side, got {image_side}; give fewer layers"
            )
        widths = [base_channels * min(2**index, MOST_WIDENING) for index in range(num_layers + 1)]
        layers: list[nn.Module] = [_conv4(3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for index, width in enumerate(widths[1:], start=1):
            layers += [
                _conv4(widths[index - 1], width, stride=2 if index < num_layers else 1),
                nn.GroupNorm(math.gcd(MOST_GROUPS, max(width // LEAST_CHANNELS, 1), width), width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, _conv4(widths[-1], 1, stride=1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Judge."""
        logits_B1hw: Tensor = self.layers(images_B3HW)
        return logits_B1hw


def _conv4(in_channels: int, out_channels: int, *, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=INIT_STD)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv

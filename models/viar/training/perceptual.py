"""Perceptual losses: how far pictures are from one another in the eyes of a network (arXiv 1801.03924).

Shape letters: B batch, C channels of a feature map, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kinds import checked

# Added to squared norms: where a network sees nothing, no gradient is magnified more than 1,000 times.
EPSILON = 1e-6
VGG = "vgg16-*.pth"  # torchvision's file of weights that lpips takes


class FeatureDistance(nn.Module):
    """Distance of two batches of images: that of LPIPS without its learnt weights.

    At every place of every feature map the channels are brought to length 1; the squared lengths of their
    differences are averaged over places, pictures and maps.

    Args:
        features: a module from images (B, 3, H, W) in [-1, 1] to a feature map (B, C, ...) or a sequence of
            them.
    """

    @checked
    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images_B3HW: Tensor, others_B3HW: Tensor) -> Tensor:
        """The distance, scalar.

        Raises:
            ValueError: `features` gives something else than feature maps.
        """
        pairs = zip(self._maps(images_B3HW), self._maps(others_B3HW), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """Feature maps (B, C, ...) of unit length along C."""
        found = self.features(images_B3HW)
        maps = list(found) if isinstance(found, Sequence) else [found]
        for x in maps:
            if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != len(images_B3HW):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"features must give tensors (B, C, ...) with B = {len(images_B3HW)} images, got {got}"
                )
        if not maps:
            raise ValueError("features must give at least one feature map, got none")
        return [x.float() * (x.float().square().sum(1, keepdim=True) + EPSILON).rsqrt() for x in maps]


def lpips_distance() -> nn.Module:
    """LPIPS with VGG's features, from the package `lpips` and weights that are on this machine.

    Nothing is downloaded.

    Raises:
        ValueError: the package or VGG's weights are not here.
    """
    try:
        lpips = import_module("lpips")
    except ImportError as error:
        raise ValueError(
            f"lpips: the package cannot be imported ({error}); install lpips and torchvision"
        ) from error
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob(VGG)):
        raise ValueError(
            f"lpips: found no weights of VGG ({VGG}) in {folder}, and nothing is downloaded unasked; "
            "torchvision.models.vgg16(weights='DEFAULT') puts them there"
        )
    distance: nn.Module = lpips.LPIPS(net="vgg", verbose=False)
    return distance

"""Features: what a network sees in images, and what sets of images are compared in.

Letters: B images, F features, S features with their place, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import check_tensor, checked, shown
from ..pretrained import fingerprint
from .classifier import Classifier

Extractor = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] to features (B, F)
NUM_SPATIAL_CHANNELS = 7  # that sFID looks at, as published
SPATIAL_SIDE = 4  # places a side of a judge's features


@dataclass(frozen=True)
class Features:
    """What a network sees in images, row by row.

    Attributes:
        pooled: (B, F) of the whole image.
        spatial: (B, S) that keep their place in the image, `None` of a network that gives none.
        probabilities: (B, C) of each class, `None` of a network that knows no classes.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None

    @classmethod
    def joined(cls, parts: list[Features]) -> Features:
        """Those of several batches of one network, one after the other, float32 on the CPU.

        Args:
            parts: of the batches, at least one.
        """
        return cls(
            torch.cat([part.pooled.float().cpu() for part in parts]),
            _joined([part.spatial for part in parts]),
            _joined([part.probabilities for part in parts]),
        )

    def rows(self, rows: Tensor) -> Features:
        """Those of some images.

        Args:
            rows: (N,) their indices.
        """
        spatial, probabilities = (
            None if value is None else value[rows] for value in (self.spatial, self.probabilities)
        )
        return Features(self.pooled[rows], spatial, probabilities)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that images are looked at with.

    Attributes:
        name: tells it from others: figures of networks of different names cannot be compared.
        see: images (B, 3, H, W) in [-1, 1] on any device to what it sees in them.
    """

    name: str
    see: Callable[[Tensor], Features]


@checked
def extractor_network(extractor: Extractor, name: str) -> FeatureNetwork:
    """A network of features alone: no sFID and no Inception score.

    Args:
        extractor: any function of images; a module should be in evaluation mode, and on the images' device.
        name: see `FeatureNetwork`.
    """
    return FeatureNetwork(name, lambda images: Features(extractor(images)))


@checked
def judge_network(classifier: Classifier) -> FeatureNetwork:
    """The judge's hidden layer, its last convolution by place, and its classes.

    As in the published sFID, 7 channels are looked at by place, here at 4 x 4 of them.

    Args:
        classifier: in evaluation mode; its weights are part of the name.
    """
    like = classifier.logits.weight

    def see(images: Tensor) -> Features:
        images = images.to(like.device, like.dtype)
        classifier.check_images(images)
        maps = classifier.convolutions(images)
        embedding = classifier.hidden(maps)
        places = F.adaptive_avg_pool2d(maps, SPATIAL_SIDE)[:, :NUM_SPATIAL_CHANNELS]
        return Features(embedding, places.flatten(1), classifier.logits(embedding).softmax(1))

    return FeatureNetwork(f"judge {fingerprint(classifier)[:12]}", see)


@checked
@torch.no_grad()
def features_of(network: FeatureNetwork, batches: Iterable[Tensor]) -> Features:
    """What a network sees in many images, a batch at a time.

    Args:
        network: to look with.
        batches: images (B, 3, H, W) in [0, 1], at least one batch; their pixels are brought to 8 bits.

    Raises:
        TypeError: one tensor in place of several batches.
        ValueError: no batch.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"batches: expected several of images, got {shown(batches)}; give a list of them")
    parts = [network.see(of_8_bits(images)) for images in batches]
    if not parts:
        raise ValueError("batches: expected at least one, got none")
    return Features.joined(parts)


def of_8_bits(images: Tensor) -> Tensor:
    """Images as a picture file would give them back, so that generated ones are looked at as real ones are.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    check_tensor("images", images, has_numbers=True)
    return images.mul(255).round().mul(2 / 255).sub(1)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part.float().cpu() for part in parts if part is not None]
    return torch.cat(there) if there else None

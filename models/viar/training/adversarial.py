"""Losses of two players: a discriminator tells pictures from reconstructions, a tokenizer makes that hard.

With D the discriminator's logits, x a picture and y its reconstruction, the discriminator makes the hinge
loss small (arXiv 1705.02894)

    mean(max(0, 1 - D(x))) / 2 + mean(max(0, 1 + D(y))) / 2

and the tokenizer makes -mean(D(y)) small, in proportion to its other losses (arXiv 2012.09841, equation 7).

Shape letters: B batch, h w patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from ..kinds import check_fields
from ..model.config import check_at_least

LARGEST_WEIGHT = 1e4
EPSILON = 1e-4  # added to the norm that is divided by
# Both gradients are taken of losses that are so many times as large: in float16 those of means over all
# pixels would vanish. A power of two changes no digit.
SCALE = 2.0**10


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Settings of the adversarial loss of a tokenizer, by default none; the others are VQGAN's.

    Raises:
        ValueError: a setting is out of range.
    """

    weight: float = 0.0  # of the loss, times the adaptive weight; 0 for no discriminator, published 0.8
    start: int = 10_000  # step from which on there is such a loss; a discriminator wins against an early blur
    num_layers: int | None = None  # of the discriminator; default by the size of the pictures
    base_channels: int = 64  # of the discriminator
    lr: float | None = None  # its highest learning rate; default that of the tokenizer
    betas: tuple[float, float] = (0.5, 0.9)  # of its AdamW

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        check_at_least("AdversarialConfig", 0, weight=self.weight, start=self.start)
        check_at_least("AdversarialConfig", 1, base_channels=self.base_channels)
        if self.num_layers is not None:
            check_at_least("AdversarialConfig", 1, num_layers=self.num_layers)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"AdversarialConfig: lr must be positive and finite, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdversarialConfig: betas must be two numbers in [0, 1), got {self.betas}")


def discriminator_loss(
    real_B1hw: Tensor,  # logits of pictures
    made_B1hw: Tensor,  # logits of reconstructions
) -> Tensor:
    """Hinge loss of the discriminator, scalar."""
    return (F.relu(1 - real_B1hw.float()).mean() + F.relu(1 + made_B1hw.float()).mean()) / 2


def generator_loss(
    made_B1hw: Tensor,  # logits of reconstructions
) -> Tensor:
    """What the tokenizer makes small against the hinge loss, scalar: minus the mean logit."""
    return -made_B1hw.float().mean()


def adaptive_weight(others: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight with which the adversarial loss moves the last layer as much as the others do, at most 1e4.

    The ratio of the norms of their gradients there, of all processes together. Of a batch in parts each part
    has a weight of its own.

    Args:
        others: scalar, reconstruction and perceptual loss.
        adversarial: scalar, `generator_loss`.
        last_layer: weight of the decoder's last layer, shape (3, C, 3, 3) or any other.

    Returns:
        Scalar without gradient.
    """
    norms = [_norm_of_gradient(loss, last_layer) for loss in (others, adversarial)]
    weight: Tensor = (norms[0] / (norms[1] + EPSILON * SCALE)).clamp(max=LARGEST_WEIGHT)
    return weight


def _norm_of_gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    """`SCALE` times the norm of the gradient of what all processes average."""
    (gradient,) = torch.autograd.grad(loss * SCALE, parameter, retain_graph=True)
    norm: Tensor = reduce(gradient.float(), "mean").norm()
    return norm

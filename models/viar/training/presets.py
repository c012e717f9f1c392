"""Named settings: what to build and how to train it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..model.config import (
    SIDES_512,
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    TokenizerConfig,
    TransformerConfig,
    TrunkConfig,
)
from .adversarial import AdversarialConfig
from .config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerPreset:
    """A tokenizer, whose `model` holds its sizes, and its training."""

    data: str  # source of images, see `viar.data.load_data`
    model: TokenizerConfig
    train: TrainConfig
    loss: str = "l1+l2"  # of the reconstruction, see `viar.training.reconstruction_loss`
    # Distance in the eyes of a network: "lpips", the file of a classifier or its folder; None for none
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    augment: int = 0  # changed versions added of each training image of an embedded source


@dataclass(frozen=True, kw_only=True)
class TransformerPreset:
    """A transformer, whose `model` holds sizes and trunk, and its training."""

    data: str  # source of images, see `viar.data.load_data`
    model: TransformerConfig
    train: TrainConfig
    augment: int = 0  # changed versions added of each training image of an embedded source


_DIGITS = TokenizerConfig(
    sides=(1, 2, 4),
    codebook_size=64,
    code_channels=8,
    base_channels=16,
    multipliers=(1, 2),
    num_residual_blocks=1,
    num_groups=8,
    num_phi=0,  # one a scale: with fewer scales than convolutions some would never be used
)
_MNIST = replace(_DIGITS, sides=(1, 2, 3, 4, 6, 8), codebook_size=256, patch=2)
# As LlamaGen trains its tokenizer (arXiv 2406.06525) with VQGAN's weight (arXiv 2012.09841).
_ADVERSARIAL = AdversarialConfig(weight=0.8, start=20_000)
_IMAGENET_STEPS = 550 * 1_281_167 // 512  # 550 epochs


def _small(tokenizer: TokenizerConfig, trunk: TrunkConfig) -> TransformerConfig:
    """A transformer for pictures of digits, of the sizes of `tokenizer`."""
    return TransformerConfig(
        depth=8,
        width=64,
        num_heads=4,
        sides=tokenizer.sides,
        codebook_size=tokenizer.codebook_size,
        code_channels=tokenizer.code_channels,
        num_classes=10,
        drop_path=0.0,
        trunk=trunk,
    )


# Training draws few iterations and penalises the residual that they leave. The block then converges in two or
# three iterations, and both caches generate the same images. A block that is trained with more iterations and
# no penalty needs them all: at three iterations a third of the images differ between the caches.
_SMALL_TRUNK = ImplicitTrunkConfig(
    num_pre=1, num_post=1, no_grad=(0, 2), grad=(1, 2), residual_weight=2.0, iterations=5
)


def _mnist(trunk: TrunkConfig) -> TransformerConfig:
    """A transformer for MNIST."""
    return replace(_small(_MNIST, trunk), depth=16, num_heads=2, drop_path=None)


# A third of the blocks are explicit, as in the published model. At least two iterations on the tape give the
# knob without a penalty; with three at most, the deepest step takes at most 0.6 of VAR's memory.
_MNIST_TRUNK = ImplicitTrunkConfig(num_pre=3, num_post=2, no_grad=(0, 3), grad=(2, 3), iterations=6)
_MNIST_TRAIN = TrainConfig(steps=4000, batch_size=8, lr=3e-3, weight_decay=(0.05, 0.05), save_every=60)
_SMALL_TRAIN = TrainConfig(seconds=180, batch_size=64, lr=4e-3, weight_decay=(0.05, 0.05), save_every=30)
_SMALL_TOKENIZER_TRAIN = TrainConfig(
    seconds=60, batch_size=64, lr=3e-3, betas=(0.9, 0.99), weight_decay=(0.01, 0.01), save_every=30
)

TOKENIZERS = {
    "digits": TokenizerPreset(
        data="digits", model=_DIGITS, train=_SMALL_TOKENIZER_TRAIN, loss="l2", augment=1
    ),
    "mnist": TokenizerPreset(
        data="mnist",
        model=_MNIST,
        train=replace(_SMALL_TOKENIZER_TRAIN, steps=2400, seconds=None, batch_size=32),
        loss="l2",
        augment=1,
    ),
    "imagenet256": TokenizerPreset(
        data="imagenet",
        model=TokenizerConfig(),
        train=TrainConfig(steps=250_000, batch_size=256, lr=1e-4, workers=8, mixed_precision="bf16"),
        perceptual="lpips",
        adversarial=_ADVERSARIAL,
    ),
    "imagenet512": TokenizerPreset(
        data="imagenet",
        model=TokenizerConfig(sides=SIDES_512),
        train=TrainConfig(steps=250_000, batch_size=128, lr=1e-4, workers=8, mixed_precision="bf16"),
        perceptual="lpips",
        adversarial=_ADVERSARIAL,
    ),
}

TRANSFORMERS = {
    "digits-viar": TransformerPreset(
        data="digits",
        model=_small(_DIGITS, _SMALL_TRUNK),
        train=_SMALL_TRAIN,
    ),
    "digits-var": TransformerPreset(
        data="digits", model=_small(_DIGITS, ExplicitTrunkConfig()), train=_SMALL_TRAIN
    ),
    "mnist-viar": TransformerPreset(
        data="mnist",
        model=_mnist(_MNIST_TRUNK),
        train=_MNIST_TRAIN,
    ),
    "mnist-var": TransformerPreset(
        data="mnist",
        model=_mnist(ExplicitTrunkConfig()),
        train=_MNIST_TRAIN,
    ),
    "imagenet256-viar": TransformerPreset(
        data="imagenet",
        model=TransformerConfig(depth=30, trunk=ImplicitTrunkConfig()),
        train=TrainConfig(steps=_IMAGENET_STEPS, workers=8, mixed_precision="fp16"),
    ),
    **{
        f"imagenet256-var-d{depth}": TransformerPreset(
            data="imagenet",
            model=TransformerConfig(depth=depth),
            train=TrainConfig(steps=_IMAGENET_STEPS, lr=2e-4, workers=8, mixed_precision="fp16"),
        )
        for depth in (16, 20, 24, 30)
    },
    "imagenet512-viar": TransformerPreset(
        data="imagenet",
        model=TransformerConfig(
            depth=36, sides=SIDES_512, shared_modulation=True, trunk=ImplicitTrunkConfig()
        ),
        train=TrainConfig(steps=_IMAGENET_STEPS, workers=8, mixed_precision="fp16"),
    ),
    "imagenet512-var-d36": TransformerPreset(
        data="imagenet",
        model=TransformerConfig(depth=36, sides=SIDES_512, shared_modulation=True),
        train=TrainConfig(steps=_IMAGENET_STEPS, lr=2e-4, workers=8, mixed_precision="fp16"),
    ),
}

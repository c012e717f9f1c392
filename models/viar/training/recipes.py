"""Recipes: what to build and how to train it, each a function that edits a dataclass.

An own recipe is one more such function, on top of those below:

    def mine(recipe: TransformerRecipe) -> TransformerRecipe:
        recipe = mnist(recipe)
        return replace(recipe, model=replace(recipe.model, width=128, num_heads=8))

A new one by name is a function and a line in `TOKENIZERS` or `TRANSFORMERS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..model.config import (
    SIDES_512,
    ExplicitTrunkConfig,
    ImplicitTrunkConfig,
    TokenizerConfig,
    TransformerConfig,
)
from .adversarial import AdversarialConfig
from .config import TrainConfig

IMAGENET_STEPS = 550 * 1_281_167 // 512  # 550 epochs in batches of 512


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """A tokenizer, whose `model` holds its sizes, and its training."""

    data: str  # images: digits, mnist, emoji, hub:NAME, or a folder with a sub-folder a class
    model: TokenizerConfig
    train: TrainConfig
    loss: str = "l1+l2"  # of the reconstruction: l1, l2 and edges, joined by +
    # Distance in the eyes of a network: "lpips", the file of a classifier or its folder; None for none
    perceptual: str | None = None
    perceptual_weight: float = 1.0  # of that distance in the loss
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)  # by default no such loss
    augment: int = 0  # changed versions added of each training image of a source that is held in memory
    # What training images go through, see `viar.data.load_data`; None is what the source does by itself.
    augmentations: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TransformerRecipe:
    """A transformer, whose `model` holds sizes and trunk, and its training."""

    # Images: digits, mnist, emoji, hub:NAME, or a folder with a sub-folder a class; or what viar tokenize
    # wrote
    data: str
    model: TransformerConfig  # sizes and trunk
    train: TrainConfig  # steps, batches, optimiser
    augment: int = 0  # changed versions added of each training image of a source that is held in memory
    # What training images go through, see `viar.data.load_data`; None is what the source does by itself.
    augmentations: tuple[str, ...] | None = None


# What the recipes below edit: models for ImageNet at 256 pixels as published, the transformer is VIAR.
PUBLISHED_TOKENIZER = TokenizerRecipe(
    data="imagenet",
    model=TokenizerConfig(),
    train=TrainConfig(steps=250_000, batch_size=256, lr=1e-4, workers=8, mixed_precision="bf16"),
    perceptual="lpips",
    # As LlamaGen trains its tokenizer (arXiv 2406.06525) with VQGAN's weight (arXiv 2012.09841).
    adversarial=AdversarialConfig(weight=0.8, start=20_000),
)
PUBLISHED = TransformerRecipe(
    data="imagenet",
    model=TransformerConfig(depth=30, trunk=ImplicitTrunkConfig()),
    train=TrainConfig(steps=IMAGENET_STEPS, workers=8, mixed_precision="fp16"),
)


def _on_a_laptop(train: TrainConfig) -> TrainConfig:
    """In small batches of data that is held in memory, in float32."""
    return replace(train, batch_size=64, workers=0, mixed_precision="no", save_every=30)


# Tokenizers


def digits_tokenizer(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """8 x 8 handwritten digits in 21 tokens: a minute on one core."""
    model = replace(
        recipe.model,
        sides=(1, 2, 4),
        codebook_size=64,
        code_channels=8,
        base_channels=16,
        multipliers=(1, 2),
        num_residual_blocks=1,
        num_groups=8,
        num_phi=0,  # one a scale: with fewer scales than convolutions some would never be used
    )
    train = replace(
        _on_a_laptop(recipe.train), steps=600, lr=3e-3, betas=(0.9, 0.99), weight_decay=(0.01, 0.01)
    )
    return replace(
        recipe,
        data="digits",
        model=model,
        train=train,
        loss="l2",
        perceptual=None,
        adversarial=AdversarialConfig(),
        augment=1,
    )


def mnist_tokenizer(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """5,000 digits of MNIST, padded to 32 pixels."""
    recipe = digits_tokenizer(recipe)
    model = replace(recipe.model, sides=(1, 2, 3, 4, 6, 8), codebook_size=256, patch=2)
    train = replace(recipe.train, steps=2400, batch_size=32)
    return replace(recipe, data="mnist", model=model, train=train)


def emoji_tokenizer(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """Small colour pictures, 64 pixels: emoji, or a folder of one's own."""
    recipe = mnist_tokenizer(recipe)
    model = replace(
        recipe.model,
        codebook_size=512,
        code_channels=16,
        base_channels=32,
        multipliers=(1, 2, 2),
    )
    train = replace(recipe.train, steps=4000, lr=2e-3)
    return replace(recipe, data="emoji", model=model, train=train, loss="l1+l2", augment=0)


def imagenet512_tokenizer(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """The tokenizer of 256 pixels with the scales of 512."""
    return replace(
        recipe,
        model=replace(recipe.model, sides=SIDES_512),
        train=replace(recipe.train, batch_size=128),
    )


TOKENIZERS = {
    "digits": digits_tokenizer(PUBLISHED_TOKENIZER),
    "mnist": mnist_tokenizer(PUBLISHED_TOKENIZER),
    "emoji": emoji_tokenizer(PUBLISHED_TOKENIZER),
    "imagenet256": PUBLISHED_TOKENIZER,
    "imagenet512": imagenet512_tokenizer(PUBLISHED_TOKENIZER),
}


# Transformers: VIAR, of which `explicit` makes the VAR of the same depth and width


def digits(recipe: TransformerRecipe) -> TransformerRecipe:
    """8 x 8 handwritten digits."""
    model = replace(
        recipe.model,
        depth=8,
        width=64,
        num_heads=4,
        num_classes=10,
        drop_path=0.0,
        # Training draws few iterations and penalises the residual that they leave. The block then converges
        # in two or three iterations, and both caches generate the same images. A block that is trained with
        # more iterations and no penalty needs them all: at three iterations a third of the images differ
        # between the caches.
        trunk=ImplicitTrunkConfig(
            num_pre=1, num_post=1, no_grad=(0, 2), grad=(1, 2), residual_weight=2.0, iterations=5
        ),
        **_sizes(TOKENIZERS["digits"]),
    )
    train = replace(_on_a_laptop(recipe.train), steps=1500, lr=4e-3, weight_decay=(0.05, 0.05))
    return replace(recipe, data="digits", model=model, train=train)


def mnist(recipe: TransformerRecipe) -> TransformerRecipe:
    """5,000 digits of MNIST, padded to 32 pixels."""
    recipe = digits(recipe)
    model = replace(
        recipe.model,
        depth=24,
        num_heads=2,
        drop_path=None,
        # At least two iterations on the tape give the knob without a penalty. Eight at most are as many as
        # leave the deepest step at less than 0.6 of VAR's memory.
        trunk=ImplicitTrunkConfig(num_pre=2, num_post=1, no_grad=(0, 6), grad=(2, 8), iterations=8),
        **_sizes(TOKENIZERS["mnist"]),
    )
    train = replace(
        recipe.train, steps=3000, batch_size=8, lr=3e-3, save_every=60, sample_every=500, validate_every=250
    )
    return replace(recipe, data="mnist", model=model, train=train)


def mnist_d12(recipe: TransformerRecipe) -> TransformerRecipe:
    """The same digits at half the depth: ten minutes on one core."""
    recipe = mnist(recipe)
    model = replace(
        recipe.model,
        depth=12,
        drop_path=None,
        trunk=ImplicitTrunkConfig(num_pre=2, num_post=1, no_grad=(0, 4), grad=(2, 3), iterations=8),
    )
    return replace(recipe, model=model, train=replace(recipe.train, steps=5000))


def mnist_shipped(recipe: TransformerRecipe) -> TransformerRecipe:
    """What `viar.weights` holds: four explicit blocks on either side, trained for longer."""
    recipe = mnist_d12(recipe)
    trunk = recipe.model.trunk
    assert isinstance(trunk, ImplicitTrunkConfig)
    model = replace(recipe.model, trunk=replace(trunk, num_pre=4, num_post=4))
    return replace(recipe, model=model, train=replace(recipe.train, steps=10_000))


def emoji(recipe: TransformerRecipe) -> TransformerRecipe:
    """Small colour pictures, 64 pixels: emoji, or a folder of one's own."""
    recipe = mnist(recipe)
    model = replace(
        recipe.model,
        depth=16,
        width=128,
        num_heads=4,
        drop_path=None,
        trunk=ImplicitTrunkConfig(num_pre=3, num_post=2, no_grad=(0, 3), grad=(2, 3), iterations=6),
        **_sizes(TOKENIZERS["emoji"]),
    )
    train = replace(recipe.train, steps=6000, batch_size=16, lr=2e-3)
    return replace(recipe, data="emoji", model=model, train=train)


def imagenet256(recipe: TransformerRecipe, *, depth: int = 30) -> TransformerRecipe:
    """ImageNet at 256 pixels, as published: depth 16, 20, 24 or 30, and a width of 64 times that."""
    return replace(recipe, model=_of_depth(recipe.model, depth))


def imagenet512(recipe: TransformerRecipe) -> TransformerRecipe:
    """ImageNet at 512 pixels, as published: depth 36, one modulation that all blocks share."""
    model = replace(_of_depth(recipe.model, 36), sides=SIDES_512, shared_modulation=True)
    return replace(recipe, model=model)


def explicit(recipe: TransformerRecipe) -> TransformerRecipe:
    """VAR: as many different blocks as the depth says, in place of the implicit trunk."""
    return replace(recipe, model=replace(recipe.model, trunk=ExplicitTrunkConfig()))


def published_var(recipe: TransformerRecipe) -> TransformerRecipe:
    """VAR with its own learning rate, 1e-4 for 256 images of a batch."""
    recipe = explicit(recipe)
    return replace(recipe, train=replace(recipe.train, lr=2e-4))


def _sizes(tokenizer: TokenizerRecipe) -> dict[str, Any]:
    """What a transformer shares with the tokenizer that it learns from."""
    model = tokenizer.model
    return {
        "sides": model.sides,
        "codebook_size": model.codebook_size,
        "code_channels": model.code_channels,
    }


def _of_depth(model: TransformerConfig, depth: int) -> TransformerConfig:
    """Width, heads and drop path are those of the new depth: a config that is made holds those of its own."""
    return replace(model, depth=depth, width=None, num_heads=None, drop_path=None)


TRANSFORMERS = {
    "digits-viar": digits(PUBLISHED),
    "digits-var": explicit(digits(PUBLISHED)),
    "mnist-viar": mnist(PUBLISHED),
    "mnist-var": explicit(mnist(PUBLISHED)),
    "mnist-viar-d12": mnist_d12(PUBLISHED),
    "mnist-var-d12": explicit(mnist_d12(PUBLISHED)),
    "mnist-viar-shipped": mnist_shipped(PUBLISHED),
    "emoji-viar": emoji(PUBLISHED),
    "emoji-var": explicit(emoji(PUBLISHED)),
    "imagenet256-viar": imagenet256(PUBLISHED),
    **{
        f"imagenet256-var-d{depth}": published_var(imagenet256(PUBLISHED, depth=depth))
        for depth in (16, 20, 24, 30)
    },
    "imagenet512-viar": imagenet512(PUBLISHED),
    "imagenet512-var-d36": published_var(imagenet512(PUBLISHED)),
}

"""A training as its recipe says, measured on held-out tokens as it goes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from viar import NextScaleTransformer, Tokenizer
from viar.data import EndlessBatches, TensorImages, TokenizedImages, all_batches, load_data
from viar.data.tokens import TokenBatch
from viar.training import TOKENIZERS, TransformerPreset, cross_entropy, train_tokenizer
from viar.training.losses import transformer_loss
from viar.training.optim import build_optimizer, set_progress

from ...case import Run
from ..viar.models import random_tokenizer

FOLDER = Path("runs/recipes")
AT_ONCE = 250  # held-out images that are measured at a time; has no influence
QUICK_IMAGES = 40


@dataclass(frozen=True)
class Tokens:
    """What a transformer trains on, and what it is measured on."""

    train: TokenizedImages
    held_out: TokenizedImages


@dataclass(frozen=True)
class Outcome:
    """A training that has ended."""

    model: NextScaleTransformer  # with the weights of the least loss of held-out tokens, in evaluation mode
    curve: list[tuple[int, float]]  # steps, and the loss of held-out tokens after them in nats

    @property
    def best(self) -> tuple[int, float]:
        """The point of the least loss."""
        return min(self.curve, key=lambda point: point[1])


@cache
def tokens_of(data: str, augment: int, quick: bool) -> Tokens:
    """Tokens of a source of images, by the tokenizer of the recipe that has its name.

    Args:
        data: name of the source and of the recipe.
        augment: changed versions added of each training image.
        quick: a few images and a tokenizer with random weights.
    """
    config = TOKENIZERS[data].model
    images = load_data(data, config.image_side, augment=0 if quick else augment)
    train, held_out = images.train, images.validation
    assert isinstance(train, TensorImages)
    assert isinstance(held_out, TensorImages)
    if quick:
        train, held_out = (
            TensorImages(*part.__getitems__(range(QUICK_IMAGES))) for part in (train, held_out)
        )
    tokenizer = tokenizer_of(data, quick)
    return Tokens(TokenizedImages(tokenizer, train), TokenizedImages(tokenizer, held_out))


@cache
def tokenizer_of(data: str, quick: bool) -> Tokenizer:
    """That of the recipe of this name, in evaluation mode; with random weights where it is `quick`."""
    if quick:
        return random_tokenizer(TOKENIZERS[data].model, torch.device("cpu"))
    folder = FOLDER / data / "tokenizer"
    if not (folder / "model.safetensors").exists():
        print(f"{folder} holds no tokenizer: its recipe trains one, which takes minutes")
        recipe = TOKENIZERS[data]
        images = load_data(data, recipe.model.image_side, augment=recipe.augment)
        torch.manual_seed(recipe.train.seed)
        tokenizer = Tokenizer(recipe.model)
        train_tokenizer(
            tokenizer, images.train, folder, recipe.train, loss=recipe.loss, console=Console(quiet=True)
        )
    return Tokenizer.from_pretrained(folder).eval()


def steps_of(
    model: NextScaleTransformer, recipe: TransformerPreset, tokens: TokenizedImages, steps: int
) -> Iterator[int]:
    """Take the steps of a training, one by one; gives how many were taken.

    Args:
        model: trained in place, in training mode.
        recipe: whose settings of training count, but for the number of steps.
        tokens: what it is trained on.
        steps: of the whole training, which schedules follow.
    """
    train = recipe.train
    optimizer = build_optimizer(model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay[0])
    step_loss = transformer_loss(None, seed=train.seed)
    batches = iter(EndlessBatches(len(tokens), train.batch_size, seed=train.seed))
    for step in range(steps):
        set_progress(optimizer, step / steps, lr=train.lr, weight_decay=train.weight_decay)
        loss, _ = step_loss(model, tokens.__getitems__(next(batches)), step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1


def trained(
    recipe: TransformerPreset, seed: int, run: Run, *, points: int = 20, steps: int | None = None
) -> Outcome:
    """The model of a recipe, trained as that says.

    Args:
        recipe: a number of steps, and no seconds.
        seed: of weights, batches and random depth.
        run: a quick one takes two steps.
        points: how often held-out tokens are measured.
        steps: default those of the recipe.
    """
    recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    tokens = tokens_of(recipe.data, recipe.augment, run.quick)
    steps = 2 if run.quick else steps or recipe.train.steps
    assert steps is not None
    torch.manual_seed(seed)
    model = NextScaleTransformer(recipe.model).train()
    best, curve, every = model.state_dict(), list[tuple[int, float]](), math.ceil(steps / points)
    for step in steps_of(model, recipe, tokens.train, steps):
        if step % every and step < steps:
            continue
        curve.append((step, held_out_loss(model, tokens.held_out)))
        if curve[-1][1] <= min(loss for _, loss in curve):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return Outcome(model.eval(), curve)


@torch.no_grad()
def held_out_loss(
    model: NextScaleTransformer, tokens: TokenizedImages, iterations: int | None = None
) -> float:
    """Cross-entropy in nats a token, in evaluation mode.

    Args:
        model: left in the mode that it was in.
        tokens: to measure.
        iterations: of the implicit block; default the config's.
    """
    training, total = model.training, 0.0
    model.eval()
    batch: TokenBatch
    for batch in all_batches(tokens, AT_ONCE):
        inputs, targets, labels = batch
        total += float(cross_entropy(model(labels, inputs, iterations), targets)) * len(labels)
    model.train(training)
    return total / len(tokens)


def knob_losses(model: NextScaleTransformer, tokens: TokenizedImages, counts: list[int]) -> dict[str, float]:
    """Loss of held-out tokens by the number of iterations, written as JSON has it."""
    return {str(count): held_out_loss(model, tokens, count) for count in counts}

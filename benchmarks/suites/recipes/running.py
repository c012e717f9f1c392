"""A training as its recipe says, and single steps of it."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from viar import NextScaleTransformer, Tokenizer
from viar.data import EndlessBatches, TensorImages, TokenizedImages, load_data
from viar.pretrained import fingerprint
from viar.training import (
    TOKENIZERS,
    TrainConfig,
    TransformerRecipe,
    train_tokenizer,
    train_transformer,
    validation_loss,
)
from viar.training.log import read_metrics
from viar.training.losses import transformer_loss
from viar.training.optim import build_optimizer, set_progress
from viar.training.settings import run_settings

from ...case import Run
from ..viar.models import descend, random_tokenizer

FOLDER = Path("runs/recipes")
POINTS = 10  # measurements of held-out images in a training
QUICK_IMAGES = 40
QUICK_STEPS = 2


@dataclass(frozen=True)
class Material:
    """What a transformer trains on, and what it is measured on."""

    tokenizer: Tokenizer
    train: TensorImages
    held_out: TensorImages

    def loss(self, model: NextScaleTransformer, iterations: int | None = None) -> float:
        """Cross-entropy of the held-out images in nats a token."""
        return validation_loss(model, self.tokenizer, self.held_out, iterations=iterations)

    def knob(self, model: NextScaleTransformer, counts: list[int]) -> dict[str, float]:
        """The same by the number of iterations, written as JSON has it."""
        return {str(count): self.loss(model, count) for count in counts}


@dataclass(frozen=True)
class Outcome:
    """A training that has ended."""

    model: NextScaleTransformer  # with the weights of the least loss of held-out images, in evaluation mode
    curve: list[tuple[int, float]]  # steps, and the loss of held-out images after them in nats

    @property
    def best_step(self) -> int:
        """The step of the least loss."""
        return min(self.curve, key=lambda point: point[1])[0]


@cache
def material_of(data: str, augment: int, quick: bool) -> Material:
    """Images of a source, and the tokenizer of the recipe that has its name.

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
        few = range(QUICK_IMAGES)
        train, held_out = (TensorImages(*part.__getitems__(few)) for part in (train, held_out))
        return Material(random_tokenizer(config, torch.device("cpu")), train, held_out)
    return Material(_trained_tokenizer(data), train, held_out)


def _trained_tokenizer(data: str) -> Tokenizer:
    """That of a recipe, trained as it says; untouched where it is there already."""
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


def trained(
    recipe: TransformerRecipe, material: Material, name: str, *, seed: int, steps: int, run: Run
) -> Outcome:
    """The model of a recipe, trained as that says; goes on where it was interrupted, read where it has ended.

    Args:
        recipe: its data is that of `material`.
        material: what to train on.
        name: of the folder of the run, in that of the recipe's data.
        seed: of weights, batches and random depth.
        steps: of the training, which schedules follow.
        run: a quick one takes few steps, in a folder that goes when the process ends.

    Raises:
        ValueError: the folder holds a training of other settings, whether it has ended or not.
    """
    root = _temporary_folder() if run.quick else FOLDER
    folder = root / recipe.data / f"{name}-{steps}-steps-seed-{seed}"
    steps = QUICK_STEPS if run.quick else steps
    every = max(steps // POINTS, 1)
    config = replace(
        recipe.train,
        steps=steps,
        seconds=None,
        seed=seed,
        validate_every=every,
        sample_every=0,
        trackers=(),
    )
    torch.manual_seed(seed)
    model = NextScaleTransformer(recipe.model)
    if _has_ended(folder, model, material, config):
        model = NextScaleTransformer.from_pretrained(folder)
    else:
        train_transformer(
            model,
            material.tokenizer,
            material.train,
            folder,
            config,
            held_out=material.held_out,
            console=Console(quiet=True),
        )
    rows = read_metrics(folder / "metrics.jsonl")
    curve = [(int(row["step"]), row["validation_loss"]) for row in rows if "validation_loss" in row]
    return Outcome(model.eval(), curve)


def trained_by(recipe: TransformerRecipe, material: Material, name: str, *, seed: int, run: Run) -> Outcome:
    """The same in as many steps as the recipe says."""
    assert recipe.train.steps is not None
    return trained(recipe, material, name, seed=seed, steps=recipe.train.steps, run=run)


def _has_ended(folder: Path, model: NextScaleTransformer, material: Material, config: TrainConfig) -> bool:
    """Whether this very training has: one of other settings is never taken for it, nor written over."""
    path = folder / "run.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if "result" not in found:
        return False
    settings = run_settings(model, material.train, config, tokenizer=fingerprint(material.tokenizer))
    if differ := [name for name, value in settings.items() if found.get(name) != value]:
        raise ValueError(
            f"{folder}: expected the training of this recipe, found one of another {' and '.join(differ)}, "
            "which has ended; move it away to train anew"
        )
    return True


@cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="viar_recipes_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def single_steps(
    model: NextScaleTransformer, recipe: TransformerRecipe, tokens: TokenizedImages, steps: int
) -> Iterator[int]:
    """Take the steps of a training one by one, to measure them; gives how many were taken.

    Args:
        model: trained in place.
        recipe: whose settings of training count, but for the number of steps.
        tokens: what it is trained on.
        steps: of the whole training, which schedules follow.
    """
    train = recipe.train
    optimizer = build_optimizer(model, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay[0])
    step_loss = transformer_loss(None, seed=train.seed)
    batches = iter(EndlessBatches(len(tokens), train.batch_size, seed=train.seed))
    model.train()
    for step in range(steps):
        set_progress(optimizer, step / steps, lr=train.lr, weight_decay=train.weight_decay)
        loss, _ = step_loss(model, tokens.__getitems__(next(batches)), step)
        descend(loss, model, optimizer, train.clip)
        yield step + 1

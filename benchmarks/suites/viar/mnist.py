"""The trained models of MNIST whose pictures are looked at, and their judge: chosen here for all cases."""

from __future__ import annotations

from functools import cache

import torch
from rich.console import Console

from viar.data import Batch, ImageData, TensorImages, load_data
from viar.evaluation import Classifier, judge
from viar.training import TOKENIZERS, TRANSFORMERS

from ...case import Run
from ..recipes.running import FOLDER, QUICK_IMAGES, material_of, trained_by
from .models import Trained, random_tokenizer, random_transformer

DATA = "mnist"
RECIPES = {"viar": "viar-shipped", "var": "var-d12"}  # by which the models are trained that are looked at
SEED = 0


def trained_mnist(run: Run) -> Trained:
    """Tokenizer, VIAR and VAR by their recipes, read from runs/recipes and trained there if they are missing.

    The same ones for every point. A quick run has random weights and a few pictures instead.
    """
    return _random(run.device) if run.quick else _by_recipe(run)


def held_out(trained: Trained, images: int) -> Batch:
    """So many held-out pictures with their labels, all of them at most, spread over all classes.

    They are sorted by class.
    """
    data = trained.data.validation
    number = min(images, len(data))
    pictures, labels = data.__getitems__([i * len(data) // number for i in range(number)])
    return pictures.to(trained.device), labels.to(trained.device)


@cache
def _by_recipe(run: Run) -> Trained:
    material = material_of(DATA, 0, quick=False)
    viar, var = (
        trained_by(TRANSFORMERS[f"{DATA}-{name}"], material, name, seed=SEED, run=run).model.to(run.device)
        for name in (RECIPES["viar"], RECIPES["var"])
    )
    data = load_data(DATA, material.tokenizer.config.image_side)
    sees = judge(data, cache=FOLDER / DATA, console=Console(quiet=True)).to(run.device)
    return Trained(material.tokenizer.to(run.device), viar, var, sees, data, run.device)


@cache
def _random(device: torch.device) -> Trained:
    codec = TOKENIZERS[DATA].model
    viar, var = (
        random_transformer(TRANSFORMERS[f"{DATA}-{RECIPES[name]}"].model, device) for name in ("viar", "var")
    )
    whole = load_data(DATA, codec.image_side)
    parts = (whole.train, whole.validation)
    # Every so many: they are sorted by class.
    train, validation = (
        TensorImages(*part.__getitems__(range(0, len(part), len(part) // QUICK_IMAGES))) for part in parts
    )
    data = ImageData(train, validation, whole.num_classes)
    torch.manual_seed(0)
    sees = Classifier(data.num_classes, codec.image_side).to(device).eval()
    return Trained(random_tokenizer(codec, device), viar, var, sees, data, device)

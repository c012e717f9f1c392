"""`viar evaluate`."""

from __future__ import annotations

import json

import torch
from rich.console import Console

from ..data import ImageData
from ..data.decoding import shown
from ..evaluation import Classifier, accuracy, balanced_labels, class_consistency, train_classifier
from ..model.config import check_at_least
from ..training import validation_loss
from .checks import check_classes, check_sampling
from .flags import DEFAULTS, Flags, SamplingFlags
from .generate import generate_images
from .loading import SHIPPED_DATA, load_images, load_pair


def evaluate_command(
    model: str | None = None,
    tokenizer: str | None = None,
    data: str | None = None,
    per_class: int = 100,
    flags: Flags = DEFAULTS,
) -> None:
    """Print validation loss and class consistency as JSON.

    Args:
        model: Folder, hub id or published checkpoint (.pth, .safetensors) of a VAR or VIAR; without it and
            --tokenizer the VIAR of handwritten digits that comes with the package.
        tokenizer: The same, of its tokenizer.
        data: Source of real images: digits, mnist, or a folder with a sub-folder a class. Default digits; of
            the models that come with the package what they learnt from.
        per_class: Images generated of each class.
        flags: How to sample.
    """
    check_at_least("viar evaluate", 1, per_class=per_class)
    _refuse_mixtures(flags)
    if data is None:
        data = SHIPPED_DATA if model is None else "digits"
    console, sampling = Console(), flags.sampling
    transformer, codec = load_pair(model, tokenizer, flags.execution)
    check_sampling(transformer, sampling, ())
    source = load_images(data, codec.config.image_side, console)
    _check_held_out(source, data)
    check_classes(transformer, data, source.num_classes)
    torch.manual_seed(0)
    classifier = Classifier(source.num_classes, codec.config.image_side)
    train_classifier(classifier, source.train, console=console)
    labels = balanced_labels(source.num_classes, per_class)
    images = generate_images(transformer, codec, labels, flags, console)
    metrics = {
        "validation_loss": validation_loss(transformer, codec, source.validation),
        "class_consistency": class_consistency(classifier, images, labels),
        "classifier_held_out_accuracy": accuracy(classifier, source.validation),
    }
    console.print_json(json.dumps(metrics))


def _check_held_out(source: ImageData, name: str) -> None:
    if not len(source.validation):
        raise ValueError(
            f"--data: {shown(name)} has nothing to hold out and measure; give two pictures of a class"
        )


def _refuse_mixtures(flags: SamplingFlags) -> None:
    if flags.settings.more_smooth:
        raise ValueError(
            "--more-smooth: mixtures of codes are no samples of the model, so metrics are not for them; "
            "evaluate without it"
        )

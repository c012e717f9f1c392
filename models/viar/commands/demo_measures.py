"""What the demo measures of its models, and the pictures of what they make.

FID is the Fréchet distance in the features of the judge, not of Inception: the figures compare with one
another, and with that of as many held-out pictures, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Batch, BatchedDataset, ImageData, save_grid, tokenize
from ..evaluation import (
    Classifier,
    Quality,
    balanced_labels,
    data_reference,
    evaluate_images,
    seconds_of,
    training_bytes,
)
from ..generation.sampling import decode_images, generate, sample_tokens
from ..generation.settings import Sampling
from ..model.config import ImplicitTrunkConfig, TransformerConfig
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training import TRANSFORMERS, cross_entropy, validation_loss
from .knob import draw_knob
from .stages import Result

PER_CLASS_SHOWN = 10  # of a grid of samples


def draw_shipped(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    held_out: BatchedDataset[Batch],
    iterations: Sequence[int],
    sampling: dict[str, Any],
    folder: Path,
) -> list[Result]:
    """Draw what a VIAR makes, all by its own iterations and one of each class by any, and measure the latter.

    Args:
        model: a VIAR in evaluation mode.
        tokenizer: its tokenizer.
        held_out: pictures with labels that it has not learnt from.
        iterations: counts of the knob.
        sampling: settings of the sampler besides them.
        folder: where shipped.png and shipped_knob.png are written.

    Returns:
        A point of the knob for each count: loss on `held_out`, and images/s.
    """
    labels = balanced_labels(model.config.num_classes, PER_CLASS_SHOWN)
    counts = all_counts(model, iterations)
    made: dict[int, Tensor] = {}

    def make(count: int) -> None:
        made[count] = generate(model, tokenizer, labels, iterations=count, **sampling)

    seconds = seconds_of([partial(make, count) for count in counts], repeats=1)
    save_grid(made[own_iterations(model)], folder / "shipped.png", columns=PER_CLASS_SHOWN)
    first = torch.cat([made[count][::PER_CLASS_SHOWN] for count in counts])
    names = [str(count) for count in counts]
    save_grid(first, folder / "shipped_knob.png", columns=model.config.num_classes, row_names=names)
    return [
        {
            "iterations": count,
            "validation_loss": validation_loss(model, tokenizer, held_out, iterations=count),
            "images_per_second": len(labels) / taken,
        }
        for count, taken in zip(counts, seconds, strict=True)
    ]


@dataclass(frozen=True)
class _Made:
    """What a model generated with a count of iterations, None where it has none or its own."""

    model: str
    iterations: int | None
    images: Tensor  # (B, 3, H, W) in [0, 1]
    cache_bytes: int
    seconds: float


def measure(
    models: dict[str, NextScaleTransformer],
    tokenizer: Tokenizer,
    data: ImageData,
    judge: Classifier,
    iterations: Sequence[int],
    per_class: int,
    sampling: dict[str, Any],
    folder: Path,
) -> Result:
    """Measure models, and draw samples and the knob of the one that is called "viar".

    Args:
        models: "viar" and "var", and others, in evaluation mode.
        tokenizer: of all of them.
        data: real pictures, which are held in memory.
        judge: a classifier of them, in evaluation mode.
        iterations: counts of the knob, of "viar" alone.
        per_class: pictures that are made of each class, model and count.
        sampling: settings of the sampler besides the iterations.
        folder: where samples.png and knob.png are written.

    Returns:
        "models"; the points of the "knob"; and figures of "real", held-out pictures.
    """
    reference = data_reference(data, judge)
    own = own_iterations(models["viar"])
    settings: list[tuple[str, int | None]] = [
        ("viar", count) for count in all_counts(models["viar"], iterations)
    ]
    settings += [(name, None) for name in models if name != "viar"]
    labels = balanced_labels(data.num_classes, per_class)
    made = _generate(models, tokenizer, labels, settings, sampling)
    seen = [evaluate_images(one.images, labels, reference) for one in made]
    points = [
        _point(models[one.model], tokenizer, data.validation, one, evaluation.matched)
        for one, evaluation in zip(made, seen, strict=True)
    ]
    knob = [point for point in points if point["model"] in ("viar", "var")]
    draw_knob(knob, folder / "knob.png")
    at_own = {
        one.model: (one, point)
        for one, point in zip(made, points, strict=True)
        if one.iterations in (None, own)
    }
    columns = min(per_class, PER_CLASS_SHOWN)
    is_shown = torch.arange(len(labels)) % per_class < columns
    save_grid(at_own["viar"][0].images[is_shown], folder / "samples.png", columns=columns)
    real = seen[0].real  # the same of all
    assert real is not None
    return {
        "models": {
            name: {
                **point,
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "training_peak_bytes": _training_bytes(models[name].config, tokenizer, data.train),
            }
            for name, (one, point) in at_own.items()
        },
        "knob": knob,
        "real": asdict(real),
    }


def _generate(
    models: dict[str, NextScaleTransformer],
    tokenizer: Tokenizer,
    labels: Tensor,
    settings: Sequence[tuple[str, int | None]],
    sampling: dict[str, Any],
) -> list[_Made]:
    """Pictures of `labels` (B,) by each setting, a model and a count of iterations."""
    samples: dict[tuple[str, int | None], tuple[Tensor, int]] = {}

    def make(name: str, count: int | None) -> None:
        sample = sample_tokens(models[name], tokenizer, labels, Sampling(iterations=count, **sampling))
        samples[name, count] = decode_images(tokenizer, sample), sample.cache_bytes

    seconds = seconds_of([partial(make, *setting) for setting in settings], repeats=1)
    return [
        _Made(*setting, *samples[setting], taken) for setting, taken in zip(settings, seconds, strict=True)
    ]


def _point(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    held_out: BatchedDataset[Batch],
    made: _Made,
    quality: Quality,
) -> Result:
    return {
        "model": made.model,
        "iterations": made.iterations,
        **asdict(quality),
        "validation_loss": validation_loss(model, tokenizer, held_out, iterations=made.iterations),
        "images_per_second": len(made.images) / made.seconds,
        "cache_bytes": made.cache_bytes,
    }


def all_counts(model: NextScaleTransformer, iterations: Sequence[int]) -> list[int]:
    """Rising counts of the knob, the model's own among them."""
    return sorted({*iterations, own_iterations(model)})


def own_iterations(model: NextScaleTransformer) -> int:
    """Iterations of a VIAR where none are asked for."""
    trunk = model.config.trunk
    assert isinstance(trunk, ImplicitTrunkConfig)
    return trunk.iterations


def _training_bytes(config: TransformerConfig, tokenizer: Tokenizer, data: BatchedDataset[Batch]) -> int:
    """Memory of the deepest training step there can be, so that the draw of iterations has no say."""
    if isinstance(config.trunk, ImplicitTrunkConfig):
        config = replace(config, trunk=config.trunk.deepest)
    model = NextScaleTransformer(config).train()
    batch = data.__getitems__(range(TRANSFORMERS["mnist-viar-d12"].train.batch_size))
    inputs, targets, labels = tokenize(tokenizer, *batch)
    return training_bytes(model, lambda: cross_entropy(model(labels, inputs), targets))

"""What a classifier sees: accuracy on real images, class consistency of generated and of edited ones.

A classifier is a module from images (B, 3, H, W) in [-1, 1] to logits (B, N), in evaluation mode, such as
`viar.evaluation.Classifier`. A metric of another kind is a file beside this one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Batch, BatchedDataset, all_batches
from ..generation.editing import edit
from ..generation.settings import Sampling
from ..kinds import checked, shown
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer


@checked
@torch.no_grad()
def accuracy(classifier: nn.Module, data: BatchedDataset[Batch], batch_size: int = 512) -> float:
    """Share of images whose class `classifier` finds, 0 to 1.

    Args:
        classifier: on any device.
        data: real images with labels.
        batch_size: images at a time; has no influence.

    Raises:
        ValueError: `data` is empty, or the classifier has no weights.
    """
    _check_not_empty(data)
    first = next(classifier.parameters(), None)
    if first is None:
        raise ValueError("classifier: expected a module with weights, got one without")
    device = first.device
    hits = sum(
        int((classifier(images.to(device)).argmax(1).cpu() == labels).sum())
        for images, labels in all_batches(data, batch_size)
    )
    return hits / len(data)


@checked
@torch.no_grad()
def class_consistency(
    classifier: nn.Module,
    images: Tensor,  # (B, 3, H, W) in [0, 1], as generated
    labels: Tensor,  # (B,) classes asked for, on the same device
) -> float:
    """Share of generated images, 0 to 1, in which `classifier` sees the class that `labels` asked for.

    Raises:
        ValueError: not one label an image, or a classifier that gives no logits.
    """
    if labels.shape != images.shape[:1] or labels.device != images.device:
        raise ValueError(
            f"labels: expected one an image, on its device, got {shown(labels)} for {shown(images)}"
        )
    logits = classifier(images * 2 - 1)
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"classifier: expected logits (B, N) of {len(labels)} images, got {shown(logits)}")
    return float((logits.argmax(1) == labels).float().mean())


@checked
def inpainting_consistency(
    classifier: nn.Module,
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch],
    mask: Tensor,  # (h, w), 0 hides
    *,
    sampling: Sampling | None = None,
    keep: str = "features",
    border: int | None = None,
    batch_size: int = 512,
) -> float:
    """Share of images that keep their class in the eyes of `classifier` when a part is made anew, 0 to 1.

    Every image of `data` is edited once, guided by its true label.

    Args:
        classifier: the judge.
        model: what edits, in evaluation mode.
        tokenizer: of `model`.
        data: real images with labels.
        mask: what is made anew and what is kept, for all images.
        sampling, keep, border: as in `viar.edit`.
        batch_size: images edited at a time.

    Raises:
        ValueError: `data` is empty; see also `viar.edit`.
    """
    _check_not_empty(data)
    device = model.pos_embed.device
    hits, start = 0.0, 0
    for images, labels in all_batches(data, batch_size):
        images, labels = images.to(device), labels.to(device)
        edited = edit(
            model,
            tokenizer,
            (images + 1) / 2,
            mask,
            labels,
            sampling=sampling,
            first_index=start,
            keep=keep,
            border=border,
        )
        hits += class_consistency(classifier, edited, labels) * len(labels)
        start += len(labels)
    return hits / len(data)


def _check_not_empty(data: BatchedDataset[Batch]) -> None:
    if not len(data):
        raise ValueError("data: expected at least 1 image to measure, got 0")


@checked
def balanced_labels(num_classes: int, per_class: int) -> Tensor:
    """Labels 0, 0, ..., 1, 1, ...: `per_class` of each class, (num_classes * per_class,) int64.

    Raises:
        ValueError: a number is below 0.
    """
    if num_classes < 0 or per_class < 0:
        raise ValueError(
            f"num_classes, per_class: expected at least 0 of each, got {num_classes} and {per_class}"
        )
    return torch.arange(num_classes).repeat_interleave(per_class)

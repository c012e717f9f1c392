"""Measures: class consistency, speed, memory of sampling and of training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from deqlib.diagnostics import saved_bytes

from ..data.sources import Batch, EndlessBatches, all_batches
from ..generation.editing import edit
from ..generation.settings import Sampling
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from ..training.optim import build_optimizer, lr_factor


class Classifier(nn.Module):
    """Small convolutional classifier of real images, the judge of generated ones.

    Args:
        num_classes: N.
        image_side: pixels a side, a multiple of 4.
        width: channels at full resolution.
    """

    def __init__(self, num_classes: int, image_side: int, width: int = 32) -> None:
        super().__init__()
        if image_side % 4:
            raise ValueError(f"image_side: expected a multiple of 4, got {image_side}")
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(32 * width, num_classes),
        )

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, N) of images in [-1, 1]."""
        return self.layers(images_B3HW)

    def save(self, path: Path) -> None:
        """Write the weights."""
        save_file(self.state_dict(), path)

    def load(self, path: Path) -> Classifier:
        """Read the weights."""
        self.load_state_dict(load_file(path))
        return self


def train_classifier(
    classifier: Classifier,
    data: Dataset[Batch],
    *,
    steps: int = 600,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Train in place on images and labels."""
    torch.manual_seed(seed)
    optimizer = build_optimizer(classifier, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    batches = iter(EndlessBatches(len(data), batch_size, seed=seed))
    device = next(classifier.parameters()).device
    classifier.train()
    for step in track(range(steps), "classifier", console=console):
        images, labels = data.__getitems__(next(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step / steps)
        loss = F.cross_entropy(classifier(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, data: Dataset[Batch], batch_size: int = 512) -> float:
    """Share of images whose class `classifier` finds."""
    device = next(classifier.parameters()).device
    hits = sum(
        int((classifier(images.to(device)).argmax(1).cpu() == labels).sum())
        for images, labels in all_batches(data, batch_size)
    )
    return hits / len(data)


@torch.no_grad()
def class_consistency(
    classifier: Classifier,
    images: Tensor,  # (B, 3, H, W) in [0, 1], as generated
    labels: Tensor,  # (B,) classes asked for
) -> float:
    """Share of generated images in which `classifier` sees the class that was asked for."""
    return float((classifier(images * 2 - 1).argmax(1) == labels).float().mean())


def inpainting_consistency(
    classifier: Classifier,
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: Dataset[Batch],
    mask: Tensor,  # (h, w), 0 hides
    *,
    sampling: Sampling | None = None,
    keep: str = "features",
    border: int | None = None,
    batch_size: int = 512,
) -> float:
    """Share of images that keep their class in the eyes of `classifier` when a part is made anew.

    Every image of `data` is edited once, guided by its true label; settings as in `viar.edit`.
    """
    hits, start = 0.0, 0
    for images, labels in all_batches(data, batch_size):
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


def balanced_labels(num_classes: int, per_class: int) -> Tensor:
    """0, 0, ..., 1, 1, ...: `per_class` of each class."""
    return torch.arange(num_classes).repeat_interleave(per_class)


def seconds_of(tasks: Sequence[Callable[[], Any]], *, repeats: int = 3) -> list[float]:
    """Median seconds of each task, run in turns so that a slow moment of the machine meets them all."""
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, taken in zip(tasks, times, strict=True):
            start = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def training_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Memory one training step needs, counted: exact on any device, whatever the allocator does.

    Parameters, their gradients, AdamW's two moments, and the activations saved for the backward pass of
    `loss()` (storages that parameters own are not counted twice).
    """
    parameters = list(model.parameters())
    return 4 * sum(p.numel() * p.element_size() for p in parameters) + saved_bytes(loss, exclude=parameters)

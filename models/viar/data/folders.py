"""Pictures in folders, one sub-folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from .dataset import Batch
from .pictures import cut_square

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class ImageFolder(Dataset[Batch]):
    """Pictures in one sub-folder a class, read when asked for.

    The shorter edge is brought to 1.125 times `image_side` (Lanczos), then a square is cut out: at a
    random place if `train`, else from the centre.

    Args:
        files: path and label of each picture, see `class_files`.
        image_side: pixels a side of what is served.
        train: cut at random, by PyTorch's own generator, which a data loader seeds in each of its processes.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], image_side: int, *, train: bool) -> None:
        self.files, self.image_side, self.train = list(files), image_side, train

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        images = []
        for index in indices:
            with Image.open(self.files[index][0]) as file:
                images.append(cut_square(file, self.image_side, at_random=self.train))
        return torch.stack(images), torch.tensor([self.files[index][1] for index in indices])


def class_files(root: Path) -> tuple[list[tuple[Path, int]], int]:
    """Every picture below a sub-folder of `root` with the number of that sub-folder, and how many there are.

    Sub-folders are numbered by name. There is none where `root` is no folder.
    """
    classes = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    return files, len(classes)

"""Pictures in folders, one sub-folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..kinds import checked
from .dataset import Batch
from .decoding import decode_picture
from .pictures import cut_square


class ImageFolder(Dataset[Batch]):
    """Pictures in one sub-folder a class, read when asked for.

    The shorter edge is brought to 1.125 times `image_side` (Lanczos), then a square is cut out: at a
    random place if `train`, else from the centre. Each file is shown as a viewer does, see `read_picture`;
    of several frames or pages the first is taken. A broken file ends in a `ValueError` that names it, when it
    is asked for.

    Args:
        files: path and label of each picture.
        image_side: pixels a side of what is served.
        train: cut at random, by PyTorch's own generator, which `rows_of` seeds.
    """

    @checked
    def __init__(self, files: Sequence[tuple[Path, int]], image_side: int, *, train: bool) -> None:
        self.files, self.image_side, self.train = list(files), image_side, train

    @property
    def at_random(self) -> bool:
        """Whether pictures are cut at random."""
        return self.train

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Names of those that are at work."""
        return ("crop",) if self.train else ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        images = [
            cut_square(decode_picture(self.files[index][0]), self.image_side, at_random=self.train)
            for index in indices
        ]
        return torch.stack(images), torch.tensor([self.files[index][1] for index in indices])

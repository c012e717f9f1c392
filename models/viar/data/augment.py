"""Changed versions of images: a fixed number of each, or a new one every time an image is drawn.

Shape letters: B images of a batch, N of a data set.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..kinds import checked
from ..seeds import seed_at
from .batches import rows_of
from .dataset import Batch, BatchedDataset, TensorImages
from .pictures import RESIZE

# Each draws for every image by itself; those that are named are done together.
AUGMENTATIONS = {
    "rotate": "by up to 8 degrees",
    "shear": "by up to a tenth",
    "scale": "by up to a tenth",
    "shift": "by up to 5 % of the side",
    "crop": "a square cut out at random, whose side is the shorter edge divided by 1.125",
    "flip": "left and right exchanged, every other time",
}
NUM_DRAWS = 8  # numbers drawn for an image
SLIGHT = ("rotate", "shear", "scale", "shift")  # what leaves a digit the digit that it is


def check_augmentations(names: Collection[str]) -> None:
    """Raise `ValueError` unless these are names of augmentations, each once."""
    strange = [name for name in names if name not in AUGMENTATIONS]
    if strange:
        raise ValueError(f"augmentations: expected some of {', '.join(AUGMENTATIONS)}, got {strange[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"augmentations: expected each name once, got {', '.join(names)}")


@checked
def augmented(data: TensorImages, copies: int, names: Collection[str] = SLIGHT) -> TensorImages:
    """`data` and `copies` changed versions of each image, always the same ones.

    Args:
        data: N images.
        copies: at least 0.
        names: some of `AUGMENTATIONS`; default turned, sheared, scaled and shifted slightly.

    Returns:
        (1 + copies) N images: those of `data`, then every version of all of them in turn.

    Raises:
        ValueError: a name of no augmentation, fewer than 0 copies.
    """
    check_augmentations(names)
    if copies < 0:
        raise ValueError(f"copies: expected at least 0, got {copies}")
    generator = torch.Generator().manual_seed(0)
    versions = [data.images]
    for _ in range(copies):
        draws = torch.rand(5, len(data), generator=generator)
        if {"crop", "flip"} & set(names):
            draws = torch.cat([draws, torch.rand(3, len(data), generator=generator)])
        versions.append(_changed(data.images, names, draws))
    kept = in_order(names) if copies else ()
    return TensorImages(torch.cat(versions), data.labels.repeat(copies + 1), kept)


class AugmentedImages(Dataset[Batch]):
    """Images of `data`, each changed anew whenever it is drawn, by PyTorch's own generator.

    Through `rows_of` the changes of a row are a function of a seed and the number of the row.

    Args:
        data: N images.
        names: some of `AUGMENTATIONS`, "crop" only if `data` does not cut its pictures itself.

    Raises:
        ValueError: a name of no augmentation.
    """

    at_random = True

    @checked
    def __init__(self, data: BatchedDataset[Batch], names: Collection[str]) -> None:
        check_augmentations(names)
        self.data, self.names = data, in_order(names)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Names of those that are at work, the data set's own among them."""
        return in_order({*self.names, *getattr(self.data, "augmentations", ())})

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        images, labels = self.data.__getitems__(indices)
        return _changed(images, self.names, torch.rand(NUM_DRAWS, len(images))), labels

    def draw(self, rows: Sequence[int], seed: int) -> Batch:
        """What `rows_of` gives of these rows, changed all at once."""
        images, labels = rows_of(self.data, rows, seed)
        generator = torch.Generator()
        draws = [
            # The first numbers of this seed are those that `data` cuts its picture by.
            torch.rand(2 * NUM_DRAWS, generator=generator.manual_seed(seed_at(seed, row)))[NUM_DRAWS:]
            for row in rows
        ]
        return _changed(images, self.names, torch.stack(draws, 1)), labels


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """The names in the order of `AUGMENTATIONS`: what is the same is written in the same way."""
    return tuple(name for name in AUGMENTATIONS if name in names)


def _changed(
    images: Tensor,  # (B, 3, H, W)
    names: Collection[str],
    draws: Tensor,  # (5 or NUM_DRAWS, B) in [0, 1), the last three for "crop" and "flip"
) -> Tensor:
    signed = draws * 2 - 1
    turn, shear, scale, right, down = (
        draw if name in names else torch.zeros_like(draw)
        for name, draw in zip(("rotate", "shear", "scale", "shift", "shift"), signed[:5], strict=True)
    )
    turn, shear, scale = turn * (8 * torch.pi / 180), shear * 0.1, 1 + scale * 0.1
    right, down = right * 0.1, down * 0.1  # the side is 2 long
    if "crop" in names:
        scale = scale / RESIZE
        right, down = (
            at + offset * (1 - 1 / RESIZE) for at, offset in zip((right, down), signed[5:7], strict=True)
        )
    rows = [
        torch.stack([turn.cos() * scale, shear - turn.sin() * scale, right], 1),
        torch.stack([turn.sin() * scale, turn.cos() * scale, down], 1),
    ]
    if "flip" in names:
        turned = draws[7, :, None, None, None] < 0.5
        images = torch.where(turned, images.flip(-1), images)
    if set(names) <= {"flip"}:  # nothing is resampled
        return images
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

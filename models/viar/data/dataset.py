"""What a data set is to training and evaluation, and the one that is held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..kinds import checked, shown
from .report import FolderReport

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) in [-1, 1], labels (B,) int64

T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class BatchedDataset(Protocol[T_co]):
    """A number of samples that are served a batch at a time: `Batch` for images with labels.

    `torch.utils.data.DataLoader` with a batch sampler asks for no more than these two methods. One that draws
    nothing at random may say so by an attribute `at_random` that is false: it is served a batch at a time
    then, others row by row, see `rows_of`.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> T_co:
        """The samples at `indices`, in that order, as one batch."""
        ...


class TensorImages(Dataset[Batch]):
    """Images held in memory, served a batch at a time.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        labels: (N,) classes.
        augmentations: names of those that some of the images have gone through.

    Raises:
        TypeError, ValueError: no such images or labels.
    """

    at_random = False

    @checked
    def __init__(
        self,
        images: Tensor,  # (N, 3, H, W) in [-1, 1]
        labels: Tensor,  # (N,)
        augmentations: tuple[str, ...] = (),
    ) -> None:
        if labels.is_complex() or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: expected integers, one an image, got {shown(labels)} for {shown(images)}"
            )
        self.images, self.labels, self.augmentations = images, labels.long(), augmentations

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[where], self.labels[where]


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images of one source.

    Attributes:
        train: images to learn from, with labels.
        validation: those held out.
        num_classes: N; labels are 0 to N - 1.
        class_names: of label 0, 1, ...
        report: what was found in the folder or on the hub, or left out; None where there is nothing to tell.
    """

    train: BatchedDataset[Batch]
    validation: BatchedDataset[Batch]
    num_classes: int
    class_names: tuple[str, ...] = ()
    report: FolderReport | None = None

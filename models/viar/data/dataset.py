"""What a data set is to training and evaluation, and the one that is held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .report import FolderReport

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) in [-1, 1], labels (B,) int64

T_co = TypeVar("T_co", covariant=True)


class BatchedDataset(Protocol[T_co]):
    """A number of samples that are served a batch at a time: `Batch` for images with labels.

    `torch.utils.data.DataLoader` with a batch sampler asks for no more than these two methods.
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
    """

    def __init__(
        self,
        images: Tensor,  # (N, 3, H, W) in [-1, 1]
        labels: Tensor,  # (N,)
    ) -> None:
        self.images, self.labels = images, labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        where = torch.as_tensor(indices)
        return self.images[where], self.labels[where]


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images of one source.

    Attributes:
        train: images to learn from, with labels.
        validation: those held out.
        num_classes: N; labels are 0 to N - 1.
        class_names: of label 0, 1, ...
        report: what was found in the folder that they are from; None for other sources.
    """

    train: BatchedDataset[Batch]
    validation: BatchedDataset[Batch]
    num_classes: int
    class_names: tuple[str, ...] = ()
    report: FolderReport | None = None

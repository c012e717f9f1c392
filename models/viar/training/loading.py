"""Batches of a data set, read beside the work and brought to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import BatchedDataset, rows_of


def load_batches(
    data: BatchedDataset[Any],
    indices: Iterable[list[int]],
    *,
    workers: int,
    device: torch.device,
    seed: int,
    draws: int,
) -> Iterator[list[Tensor]]:
    """The tensors of each batch, on the device.

    Args:
        data: what to read.
        indices: rows of each batch, see `rows_of`.
        workers: processes that read.
        device: where the batches go.
        seed: of the workers' generators; the process's own is not drawn from.
        draws: seed of what the data draws for each row.
    """
    loader = DataLoader(
        _ErrorsAsSamples(data, draws),
        batch_sampler=indices,
        num_workers=workers,
        # One of its own: it seeds the workers, and must not move the generator that was just restored.
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_already_collated,
        pin_memory=device.type == "cuda",
    )
    return ([part.to(device, non_blocking=True) for part in _whole(batch)] for batch in loader)


class _ErrorsAsSamples(Dataset[Any]):
    """Gives an error in place of a batch: one raised in a worker would bring the traceback in its text."""

    def __init__(self, data: BatchedDataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitems__(self, rows: list[int]) -> Any:
        try:
            return rows_of(self.data, rows, self.seed)
        except (ValueError, OSError) as error:
            return error


def _whole(batch: Any) -> Any:
    if isinstance(batch, Exception):
        raise batch
    return batch


def _already_collated(batch: Any) -> Any:
    return batch

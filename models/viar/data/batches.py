"""The order in which samples come: once each, or shuffled without end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..seeds import seed_at
from .dataset import BatchedDataset, T_co


def all_batches(data: BatchedDataset[T_co], batch_size: int) -> Iterator[T_co]:
    """Every sample once, in order.

    Args:
        data: what to serve.
        batch_size: samples at a time, at least 1; the last batch may be smaller.
    """
    for start in range(0, len(data), batch_size):
        yield data.__getitems__(range(start, min(start + batch_size, len(data))))


class EndlessBatches(Sampler[list[int]]):
    """Indices of shuffled batches without end, a function of seed and step: a resumed run goes on in order.

    Every epoch is a new permutation; a batch may reach into the next. Each of `num_ranks` processes gets
    its share of every batch.

    Args:
        size: number of samples.
        batch_size: of all processes together.
        seed: of the permutations.
        start: number of the first batch to give.
        rank: of this process.
        num_ranks: processes.

    Raises:
        ValueError: there are no samples, or `batch_size` does not divide among the processes.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, num_ranks: int = 1
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 sample to draw batches from, got {size}")
        if batch_size % num_ranks:
            raise ValueError(f"batch_size: {batch_size} does not divide among {num_ranks} processes")
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.num_ranks = rank, num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, list[int]()
        position = self.start * self.batch_size
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = torch.Generator().manual_seed(seed_at(self.seed, epoch))
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[place % self.size])
            position += self.batch_size
            yield batch[self.rank :: self.num_ranks]

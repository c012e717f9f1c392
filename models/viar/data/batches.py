"""The order in which samples come: once each, or shuffled without end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..kinds import check_kind, checked, shown
from ..seeds import seed_at
from .dataset import BatchedDataset, T_co


@checked
def all_batches(data: BatchedDataset[T_co], batch_size: int) -> Iterator[T_co]:
    """Every sample once, in order.

    Args:
        data: what to serve.
        batch_size: samples at a time, at least 1; the last batch may be smaller.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 sample at a time, got {batch_size}")
    for start in range(0, len(data), batch_size):
        yield data.__getitems__(range(start, min(start + batch_size, len(data))))


def rows_of(data: BatchedDataset[Any], rows: Sequence[int], seed: int) -> Any:
    """Rows of a data set without end: row k is sample k modulo N, changed as `seed` and k say.

    What a data set draws at random, crops say, it draws for each row from PyTorch's own generator, seeded for
    that row and put back afterwards. So a row is the same in any batch, in any process and after an
    interruption. One whose `at_random` is false is served as it is, and one that can do better than row by
    row has a method `draw` with these `rows` and this `seed`.

    Args:
        data: N samples; one that does not say whether it is `at_random` is taken to be.
        rows: numbers from 0.
        seed: of the draws.

    Returns:
        One batch, a tuple of tensors (B, ...).

    Raises:
        TypeError: `rows` are no integers.
    """
    check_kind("data: expected", data, BatchedDataset)
    are_rows = isinstance(rows, Sequence | np.ndarray)
    if not are_rows or not all(isinstance(row, int | np.integer) for row in rows):
        raise TypeError(f"rows: expected integers, got {shown(rows)}")
    draw = getattr(data, "draw", None)
    if draw is not None:
        return draw(rows, seed)
    indices = [row % len(data) for row in rows]
    if not getattr(data, "at_random", True):
        return data.__getitems__(indices)
    parts = []
    with torch.random.fork_rng(devices=[]):
        for row, index in zip(rows, indices, strict=True):
            torch.default_generator.manual_seed(seed_at(seed, row))
            parts.append(data.__getitems__([index]))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


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
        rows: give index + epoch * size in place of the index, for `rows_of`.

    Raises:
        ValueError: there are no samples, or `batch_size` does not divide among the processes.
    """

    @checked
    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        rows: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 sample to draw batches from, got {size}")
        for name, value in (("seed", seed), ("start", start)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if batch_size < 1 or num_ranks < 1:
            raise ValueError(
                f"batch_size, num_ranks: expected at least 1 of each, got {batch_size} and {num_ranks}"
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank: expected 0 to {num_ranks - 1}, got {rank}")
        if batch_size % num_ranks:
            raise ValueError(f"batch_size: {batch_size} does not divide among {num_ranks} processes")
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.num_ranks, self.rows = rank, num_ranks, rows

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
                batch.append(order[place % self.size] + (epoch * self.size if self.rows else 0))
            position += self.batch_size
            yield batch[self.rank :: self.num_ranks]

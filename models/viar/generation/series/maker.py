"""Making the images of a series: what is sampled together, on which threads, and what is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ...launch import launched
from ...memory import BatchSize, is_shortage
from ...tokenizer import Tokenizer
from ..scalewise import Sample
from .folder import SeriesFolder

Code = list[Tensor] | Tensor | None  # tokens of one image, or its f_hat


def runs(missing: Sequence[int], batch_size: int) -> Iterator[tuple[range, list[int]]]:
    """What to sample together where the size of a batch changes nothing: missing neighbours, at most a batch.

    Args:
        missing: indices of images, rising.
        batch_size: most images sampled together.

    Yields:
        Indices to sample, and those of them that are wanted: all.
    """
    start = 0
    for end in range(1, len(missing) + 1):
        whole = end - start == batch_size
        if end == len(missing) or missing[end] != missing[end - 1] + 1 or whole:
            yield range(missing[start], missing[end - 1] + 1), list(missing[start:end])
            start = end


def whole_batches(missing: Sequence[int], batch_size: int) -> Iterator[tuple[range, list[int]]]:
    """What to sample together where the batch counts: full ones that begin at multiples of their size.

    That is where rounding may decide, and where a capture is for one size.

    Args:
        missing: indices of images, rising.
        batch_size: images sampled together.

    Yields:
        Indices to sample, and those of them that are wanted: the missing ones.
    """
    wanted: dict[int, list[int]] = {}
    for index in missing:
        wanted.setdefault(index // batch_size, []).append(index)
    for batch, indices in wanted.items():
        yield range(batch * batch_size, (batch + 1) * batch_size), indices


@dataclass
class Maker:
    """Samples and decodes images, and writes them. A context: its threads end with it.

    On a CPU a thread of the pool decodes an image and writes it, with all of its arithmetic on that thread.
    On a GPU this thread decodes, and the pool writes.

    Attributes:
        draw: from labels and `first_index` to a sample, all else given.
        tokenizer: turns tokens into images.
        classes: labels that the images get in turn.
        target: where images are written.
        batch_size: most images that are sampled together.
        inexact: why an image is not the same in a batch of any size; `None` if it is. See
            `viar.generation.series.series`.
        soft: whether images are mixtures of codes, which their tokens do not give; `inexact` then.
        console: where it is told that memory did not suffice.
        resampled: how many images were sampled again alone.
    """

    draw: Callable[..., Sample]
    tokenizer: Tokenizer
    classes: list[int]
    target: SeriesFolder
    batch_size: int
    inexact: str | None
    soft: bool
    console: Console | None
    resampled: int = field(default=0, init=False)

    def __enter__(self) -> Maker:
        self.on_cpu = self.tokenizer.quantizer.codebook.weight.device.type == "cpu"
        self.threads = torch.get_num_threads()
        num_processes = launched("LOCAL_WORLD_SIZE")
        workers = self.threads if self.on_cpu else max(1, (os.cpu_count() or 1) // num_processes)
        self.size = BatchSize(self.batch_size, self._tell)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        # The pool's threads have set the number for every thread that starts after them.
        torch.set_num_threads(self.threads)

    def make(self, indices: range, wanted: list[int]) -> None:
        """Sample images `indices`, and write those that are wanted.

        Raises:
            ValueError: memory does not suffice, and fewer at a time would be other images.
            MemoryError, RuntimeError: memory does not suffice for a single one.
        """
        if self.inexact is None:
            for _ in self.size.parts(indices, lambda part: self._make(part, wanted)):
                pass
            return
        try:
            self._make(indices, wanted)
        except Exception as error:
            if not is_shortage(error):
                raise
            raise ValueError(
                f"batch_size: memory does not suffice for {len(indices)} images at a time, and because of "
                f"{self.inexact} fewer would be others; give a smaller one and another folder"
            ) from error

    def _make(self, indices: range, wanted: list[int]) -> None:
        labels = [self._label(index) for index in indices]
        if self.inexact is None or not self.on_cpu:
            sample = self.draw(labels, first_index=indices.start)
        else:
            sample = self.pool.submit(self.draw, labels, first_index=indices.start).result()
        certain: list[bool] = sample.certain.tolist()
        jobs = []
        for index in (index for index in wanted if index in indices):
            row = index - indices.start
            alone = self.inexact is None and not certain[row]
            self.resampled += alone
            code: Code = None
            if self.soft:
                code = sample.f_hat[row : row + 1]
            elif not alone:
                code = [tokens_Bl[row : row + 1] for tokens_Bl in sample.tokens]
            jobs.append(self._start(index, code))
        wait(jobs)  # all of them, before one that failed is told: the same files may be written again
        for job in jobs:
            job.result()

    def _tell(self, most: int) -> None:
        text = f"memory did not suffice: from here on {most} images are sampled at a time"
        (self.console or Console(stderr=True)).print(text, style="yellow", highlight=False, soft_wrap=True)

    def _start(self, index: int, code: Code) -> Future[None]:
        """Begin to write an image, and to decode it where the pool does that."""
        if self.on_cpu:
            return self.pool.submit(self._finish, index, code)
        return self.pool.submit(self.target.write, index, self._pixels(index, code))

    def _finish(self, index: int, code: Code) -> None:
        self.target.write(index, self._pixels(index, code))

    @torch.no_grad()
    def _pixels(self, index: int, code: Code) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of an image from what stands for it; without, it is sampled alone."""
        if code is None:
            code = self.draw([self._label(index)], first_index=index).tokens
        if isinstance(code, Tensor):
            images_BCHW = self.tokenizer.decode_f_hat(code)
        else:
            images_BCHW = self.tokenizer.decode(code)
        image_CHW = images_BCHW[0].float().add(1).div(2)
        pixels: np.ndarray = image_CHW.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
        return pixels

    def _label(self, index: int) -> int:
        return self.classes[index % len(self.classes)]

"""Work in parts that memory suffices for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
# What PyTorch says in a RuntimeError where memory does not suffice. The last is oneDNN's, which may mean
# something else too: a single image, for which there is room, tells these apart.
_WORDS = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "could not create a primitive",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice.

    Args:
        error: of Python, or of PyTorch on any device.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


class BatchSize:
    """How many are worked on at a time: half as many from where memory did not suffice on.

    Args:
        most: to begin with.
        tell: called with the new number when it is halved; default not at all.
    """

    def __init__(self, most: int, tell: Callable[[int], None] = lambda most: None) -> None:
        self.most, self.tell = most, tell

    def parts(self, numbers: range, work: Callable[[range], T]) -> Iterator[T]:
        """What `work` makes of consecutive parts of `numbers`; of one that memory did not suffice for, again.

        Args:
            numbers: of step 1.
            work: may be called again with numbers that it was called with.

        Raises:
            MemoryError, RuntimeError: memory does not suffice for a single one.
        """
        start = numbers.start
        while start < numbers.stop:
            part = range(start, min(start + self.most, numbers.stop))
            made = self._tried(part, work)
            if made:
                yield made.pop()
                start = part.stop

    def _tried(self, part: range, work: Callable[[range], T]) -> list[T]:
        """What was made, alone in a list, or nothing where there is to be another try."""
        try:
            return [work(part)]
        except Exception as error:
            if len(part) == 1 or not is_shortage(error):
                raise
        # Only here is the error gone, and with it the frames that hold what was computed so far.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.most = (len(part) + 1) // 2
        self.tell(self.most)
        return []

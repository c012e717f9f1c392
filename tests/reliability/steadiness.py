"""Whether a process holds no more in the end of long work than at its beginning."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import psutil


@dataclass
class Memory:
    """Memory of a process as it was looked at over time, once it was warm.

    Attributes:
        process: that is looked at; default this one.
        sizes: bytes in use that the operating system counts, in the order of the looks.
        counts: of this process, blocks of memory that Python holds, and objects its collector knows.
    """

    process: psutil.Process = field(default_factory=psutil.Process)
    sizes: list[int] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)

    def look(self, *, objects: bool = True) -> None:
        """Look once more.

        Args:
            objects: count them too, in this process.
        """
        if objects:
            gc.collect()
            self.counts.append((sys.getallocatedblocks(), len(gc.get_objects())))
        self.sizes.append(self.process.memory_info().rss)

    def growth(self, noise: float) -> int:
        """Bytes by which the median of the last third of looks is above that of the first.

        Args:
            noise: share of its memory by which a process may be larger for no reason of ours.

        Raises:
            AssertionError: it is more than that.
        """
        first, last = _ends(self.sizes)
        assert last - first <= noise * first, f"memory grew from {first:,} to {last:,}: {self.sizes}"
        return int(last - first)

    def check_objects(self, most: int) -> None:
        """Raise `AssertionError` where objects came and stayed.

        Args:
            most: by which the median of the last third of counts may be above that of the first.
        """
        for name, counts in zip(("blocks", "objects"), zip(*self.counts, strict=True), strict=True):
            first, last = _ends(counts)
            assert last - first < most, f"{name} grew from {first:,} to {last:,}: {counts}"


def told(growth: int) -> str:
    """Bytes as the page shows them, with their sign."""
    return f"{growth / 1e6:+.1f} MB"


def _ends(values: Sequence[int]) -> tuple[float, float]:
    """Medians of the first third and of the last."""
    third = max(1, len(values) // 3)
    return median(values[:third]), median(values[-third:])

"""Keys and values of the scales generated so far, in the caches of `deqlib.loops`.

| cache | sets kept for the implicit block | solver | iterations over scales |
| --- | --- | --- | --- |
| `EquilibriumCache` | one, at the fixed point | any | any |
| `IterateCache` | one an iteration (the published program) | Picard, fixed counts | not rising |

Explicit blocks have one set in both. A generation owns its cache. A block writes its keys and values where
they will stay and attends to past and present in place: nothing is copied or concatenated. What an evaluation
of the implicit block writes, the next evaluation of the same set overwrites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from deqlib import KeyValueCache

from ..kinds import checked
from .schedule import MOST_ITERATIONS, Adaptive

CACHES = ("equilibrium", "iterate")


class IterateCache(KeyValueCache):
    """One set of keys and values an iteration of the implicit block.

    Iteration i of a scale sees what iteration i of the earlier scales saw, so n iterations at every scale
    equal n Picard iterations on all scales at once. An iteration that the scale before did not run has
    nothing to see: the published program then loses context without a word, here it is an error.

    Args:
        sides: of the scales to come, p_1 < ... < p_K.
        iterations: of each scale.

    Raises:
        ValueError: see `check_iterate_schedule`; another number of counts than scales.
    """

    @checked
    def __init__(self, sides: Sequence[int], iterations: Sequence[int]) -> None:
        check_iterate_schedule(iterations)
        if len(iterations) != len(sides):
            raise ValueError(f"iterations: expected {len(sides)} counts, one a scale, got {list(iterations)}")
        counts = list(zip(sides, iterations, strict=True))
        # Scales that stop before an iteration leave nothing in its set.
        super().__init__([tokens_of(side for side, n in counts if n > i) for i in range(max(iterations))])

    def _set_of(self, evaluation: int) -> int:
        return evaluation


def tokens_of(sides: Iterable[int]) -> int:
    """Tokens of scales of these sides."""
    return sum(side * side for side in sides)


def check_cache_name(cache: str) -> None:
    """Raise `ValueError` unless `cache` names one of `CACHES`."""
    if not isinstance(cache, str) or cache not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")


def check_iterate_schedule(schedule: Sequence[int | Adaptive | None]) -> None:
    """Raise `ValueError` unless the entries are counts, none huge or above that of the scale before."""
    counts = [entry for entry in schedule if isinstance(entry, int)]
    if len(counts) != len(schedule):
        raise ValueError("cache: 'iterate' needs fixed counts, got Adaptive; use cache='equilibrium'")
    if max(counts, default=0) > MOST_ITERATIONS:
        raise ValueError(f"iterations: expected at most {MOST_ITERATIONS} a scale, got {counts}")
    if any(later > earlier for earlier, later in pairwise(counts)):
        raise ValueError(
            f"iterations: the iterate cache needs counts that do not rise from scale to scale, "
            f"got {counts}; use cache='equilibrium' for rising counts"
        )

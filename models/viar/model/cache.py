"""Keys and values of the scales generated so far, in buffers that a generation owns.

| cache | sets kept for the implicit block | solver | iterations over scales |
| --- | --- | --- | --- |
| `EquilibriumCache` | one, at the fixed point | any | any |
| `IterateCache` | one an iteration (the published program) | Picard, fixed counts | not rising |

Explicit blocks have one set in both. Buffers have their final size from the start, in the type the model
computes in. A block writes its keys and values where they will stay and attends to past and present in
place: nothing is copied or concatenated. What an evaluation of the implicit block writes, the next evaluation
of the same set overwrites.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .attention import KeyValue
from .schedule import Adaptive

CACHES = ("equilibrium", "iterate")
ALL_ROWS = slice(None)


class KeyValueCache(ABC):
    """Keys and values of one generation; a subclass says which sets of them a layer has.

    Args:
        sides: of the scales to come, p_1 < ... < p_K.
    """

    def __init__(self, sides: Sequence[int]) -> None:
        self._tokens = [side * side for side in sides]
        self._like: Tensor | None = None
        self._buffers: dict[tuple[str, int], KeyValue] = {}
        self._end = 0

    @abstractmethod
    def _set(self, layer: str, evaluation: int) -> int:
        """Which of the layer's sets its evaluation of that number at a scale reads and writes."""

    @abstractmethod
    def _capacity(self, layer: str, number: int) -> int:
        """Tokens that set `number` of a layer holds in the end."""

    def open_scale(
        self,
        num_tokens: int,
        like: Tensor,  # (B, H, any, C / H): batch, heads, head width, type and device of keys and values
    ) -> None:
        """From now on slots end with the next `num_tokens` tokens.

        Raises:
            ValueError: the cache has no room for them.
        """
        if self._end + num_tokens > sum(self._tokens):
            raise ValueError(
                f"cache: {num_tokens} tokens after {self._end} are more than its {sum(self._tokens)}; "
                "make a new cache for every generation"
            )
        self._end += num_tokens
        self._like = like if self._like is None else self._like

    def slot(self, layer: str, rows: slice = ALL_ROWS, evaluation: int = 0) -> KeyValue:
        """Keys and values of a layer: those of the scales before, then room for the open one's.

        Args:
            layer: name of the block.
            rows: samples of the batch.
            evaluation: how often the block was evaluated at this scale before.

        Returns:
            Keys and values, each (rows, H, tokens so far, C / H), views of the buffers.
        """
        key = (layer, self._set(layer, evaluation))
        if key not in self._buffers:
            assert self._like is not None  # a scale is open
            B, H, _, d = self._like.shape
            # Tokens before heads in memory: what one token adds is then in one piece.
            size = (B, self._capacity(*key), H, d)
            self._buffers[key] = (self._like.new_empty(size), self._like.new_empty(size))
        keys, values = (buffer[rows, : self._end].transpose(1, 2) for buffer in self._buffers[key])
        return keys, values

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for pair in self._buffers.values() for t in pair)

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and values that hold a token already."""
        return sum(
            t[:, : self._end].numel() * t.element_size() for pair in self._buffers.values() for t in pair
        )


class EquilibriumCache(KeyValueCache):
    """One set of keys and values a layer, whatever the number of iterations.

    Args:
        sides: of the scales to come, p_1 < ... < p_K.
    """

    def _set(self, layer: str, evaluation: int) -> int:
        return 0

    def _capacity(self, layer: str, number: int) -> int:
        return sum(self._tokens)


class IterateCache(KeyValueCache):
    """One set of keys and values an iteration of the implicit block.

    Iteration i of a scale sees what iteration i of the earlier scales saw, so n iterations at every scale
    equal n Picard iterations on all scales at once. An iteration that the scale before did not run has
    nothing to see: the published program then loses context without a word, here it is an error.

    Args:
        sides: of the scales to come, p_1 < ... < p_K.
        iterations: of each scale.
        layer: name of the implicit layer.

    Raises:
        ValueError: see `check_iterate_schedule`; another number of counts than scales.
    """

    def __init__(self, sides: Sequence[int], iterations: Sequence[int], layer: str) -> None:
        super().__init__(sides)
        check_iterate_schedule(iterations)
        if len(iterations) != len(sides):
            raise ValueError(f"iterations: expected {len(sides)} counts, one a scale, got {list(iterations)}")
        self._iterations = list(iterations)
        self._layer = layer

    def _set(self, layer: str, evaluation: int) -> int:
        return evaluation

    def _capacity(self, layer: str, number: int) -> int:
        if layer != self._layer:
            return sum(self._tokens)
        # Scales that stop before this iteration leave nothing in its set.
        return sum(
            tokens for tokens, count in zip(self._tokens, self._iterations, strict=True) if count > number
        )


def check_cache_name(cache: str) -> None:
    """Raise `ValueError` unless `cache` names one of `CACHES`."""
    if cache not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")


def check_iterate_schedule(schedule: Sequence[int | Adaptive | None]) -> None:
    """Raise `ValueError` unless the entries are counts, none above that of the scale before."""
    counts = [entry for entry in schedule if isinstance(entry, int)]
    if len(counts) != len(schedule):
        raise ValueError("cache: 'iterate' needs fixed counts, got Adaptive; use cache='equilibrium'")
    if any(later > earlier for earlier, later in pairwise(counts)):
        raise ValueError(
            f"iterations: the iterate cache needs counts that do not rise from scale to scale, "
            f"got {counts}; use cache='equilibrium' for rising counts"
        )

"""Keys and values of the scales already generated.

| cache | sets kept for the implicit block | solver | iterations over scales |
| --- | --- | --- | --- |
| `EquilibriumCache` | one, at the fixed point | any | any |
| `IterateCache` | one an iteration (the published program) | Picard, fixed counts | not rising |

Explicit blocks have one set in both. Buffers are allocated at their final size when a layer commits
its first scale, in the type of what it commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .attention import KeyValue


@dataclass
class _Buffer:
    keys: Tensor  # (B, H, capacity, C / H)
    values: Tensor
    filled: int = 0

    def append(self, new: KeyValue) -> None:
        end = self.filled + new[0].shape[2]
        self.keys[:, :, self.filled : end] = new[0]
        self.values[:, :, self.filled : end] = new[1]
        self.filled = end


class EquilibriumCache:
    """One set of keys and values a layer. `sides` are those of the scales to come."""

    per_iteration = False

    def __init__(self, sides: Sequence[int]) -> None:
        self._tokens = [side * side for side in sides]
        self._buffers: dict[tuple[str, int], _Buffer] = {}

    def past(self, layer: str, iteration: int = 0) -> KeyValue | None:
        """Keys and values `layer` committed so far; `None` before the first scale."""
        buffer = self._buffers.get((layer, iteration))
        if buffer is None:
            return None
        return buffer.keys[:, :, : buffer.filled], buffer.values[:, :, : buffer.filled]

    def commit(self, layer: str, new: KeyValue, iteration: int = 0) -> None:
        """Append the keys and values of a finished scale."""
        key = (layer, iteration)
        if key not in self._buffers:
            B, H, _, d = new[0].shape
            size = (B, H, self._capacity(layer, iteration), d)
            self._buffers[key] = _Buffer(new[0].new_empty(size), new[1].new_empty(size))
        self._buffers[key].append(new)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for b in self._buffers.values() for t in (b.keys, b.values))

    def _capacity(self, layer: str, iteration: int) -> int:
        return sum(self._tokens)


class IterateCache(EquilibriumCache):
    """One set of keys and values an iteration of the implicit block.

    Iteration i of a scale sees what iteration i of the earlier scales saw, so n iterations at every scale
    equal n Picard iterations on all scales at once. An iteration that the scale before did not run has
    nothing to see: the published program then loses context without a word, here it is an error.

    Args:
        sides: of the scales to come.
        iterations: of each scale.
        layer: name of the implicit layer.

    Raises:
        ValueError: `iterations` rise from one scale to the next.
    """

    per_iteration = True

    def __init__(self, sides: Sequence[int], iterations: Sequence[int], layer: str) -> None:
        super().__init__(sides)
        if any(later > earlier for earlier, later in pairwise(iterations)):
            raise ValueError(
                f"iterations: the iterate cache needs counts that do not rise from scale to scale, "
                f"got {list(iterations)}; use cache='equilibrium' for rising counts"
            )
        self._iterations = list(iterations)
        self._layer = layer

    def _capacity(self, layer: str, iteration: int) -> int:
        if layer != self._layer:
            return super()._capacity(layer, iteration)
        return sum(
            tokens for tokens, count in zip(self._tokens, self._iterations, strict=True) if count > iteration
        )

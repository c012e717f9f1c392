"""What a generation keeps from scale to scale: keys, values, and what does not change.

| cache | sets kept for the implicit block | solver | iterations over scales |
| --- | --- | --- | --- |
| `EquilibriumCache` | one, at the fixed point | any | any |
| `IterateCache` | one an iteration (the published program) | Picard, fixed counts | not rising |

Explicit blocks have one set in both. Buffers have their final size from the start, in the type the model
computes in. A block writes its keys and values where they will stay and attends to past and present in
place: nothing is copied or concatenated, and an iteration overwrites what the one before it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .attention import KeyValue

ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Solve:
    """How the implicit block got along at one scale.

    Attributes:
        evaluations: of the cell, (B,), the last one included.
        residual: relative, ||f(z) - z|| / ||f(z)|| at the last evaluation, (B,); `None` if not asked for.
    """

    evaluations: Tensor
    residual: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[Solve]) -> Solve:
        """Of the samples of all parts."""
        measured = [part.residual for part in parts if part.residual is not None]
        return cls(torch.cat([part.evaluations for part in parts]), torch.cat(measured) if measured else None)


class EquilibriumCache:
    """One set of keys and values a layer; the memory of one generation, used for all scales in turn.

    Args:
        sides: of the scales to come.
        measure: record the residual of every scale.
        warm_start: start the implicit block from the fixed point of the scale before.
    """

    per_iteration = False

    def __init__(self, sides: Sequence[int], *, measure: bool = False, warm_start: bool = False) -> None:
        self.measure, self.warm_start = measure, warm_start
        self.solves: list[Solve] = []  # one a scale, of the implicit block
        self.modulations: dict[str, Tensor] = {}  # of every block, (6, B, 1, C)
        self.displacement: Tensor | None = None  # fixed point minus its start at the last scale, (B, p^2, C)
        self._tokens = [side * side for side in sides]
        self._like: Tensor | None = None
        self._buffers: dict[tuple[str, int], KeyValue] = {}
        self._end = 0

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

    def slot(self, layer: str, rows: slice = ALL_ROWS, iteration: int = 0) -> KeyValue:
        """Keys and values of a layer: those of the scales before, then room for the open one's."""
        key = (layer, iteration)
        if key not in self._buffers:
            assert self._like is not None  # a scale is open
            B, H, _, d = self._like.shape
            # Tokens before heads in memory: what one token adds is then in one piece.
            size = (B, self._capacity(layer, iteration), H, d)
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
        measure: record the residual of every scale.

    Raises:
        ValueError: `iterations` rise from one scale to the next.
    """

    per_iteration = True

    def __init__(
        self,
        sides: Sequence[int],
        iterations: Sequence[int],
        layer: str,
        *,
        measure: bool = False,
    ) -> None:
        super().__init__(sides, measure=measure)
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

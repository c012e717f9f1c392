"""Keys and values of the tokens before, for causal models with a looped block.

With a causal mask the fixed point of a token depends on the tokens before it alone: the joint fixed point is
triangular. Solving for new tokens, with the keys and values of earlier ones taken at their fixed point, gives
the joint fixed point of all.

| cache | sets of keys and values a layer | solver | joint solve that it equals |
| --- | --- | --- | --- |
| `EquilibriumCache` | one, at the fixed point | any | any, once converged |
| `StepCache` | one a loop step | `Picard`, a fixed number of steps | so many steps on all tokens at once |

Layers outside of the loop have one set in both. A call is `open`, then every attention layer calls `update`
with the keys and values of the new tokens, at each evaluation of its block, and attends to what comes back.
Buffers have their final size from the start; what an evaluation writes, the next one of the same set
overwrites.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_instance, check_integer, check_tensor

ALL_ROWS = slice(None)
_INTEGERS = (torch.int32, torch.int64)


@dataclass
class _Set:
    """Keys and values of one layer, at one loop step or at the fixed point."""

    buffers: tuple[Tensor, Tensor]  # each (B, most tokens, H, any)
    num_tokens: int = 0  # that were written, or have room to be


class KeyValueCache(ABC):
    """Keys and values of a batch of sequences; a subclass says which sets of them a layer has.

    What stays of a token is what the last evaluation in its call wrote. After a solve to a tolerance that is
    at the value returned, for every sample that converged; after a fixed number of steps, at the last iterate
    before the value. To have it at the value in any case, evaluate the cell there once more.

    Args:
        max_tokens: most tokens at a time of each set of a layer.
    """

    def __init__(self, max_tokens: Sequence[int]) -> None:
        for number in max_tokens:
            check_integer(type(self).__name__, 1, max_tokens=number)
        self._max_tokens = tuple(max_tokens)
        self._like: Tensor | None = None
        self._sets: dict[tuple[str, int], _Set] = {}
        self._evaluations: dict[str, int] = {}  # of the open tokens, by layer
        self._past = self._end = self._num_evicted = 0

    @abstractmethod
    def _set_of(self, evaluation: int) -> int:
        """Which of its sets a layer's evaluation of that number, from 0, reads and writes."""

    def open(self, num_tokens: int, like: Tensor | None = None) -> None:
        """Make room for the next tokens: from now on they are what layers are evaluated for.

        Args:
            num_tokens: how many they are.
            like: (B, H, any, head width) of the type and on the device of keys and values, for `slot`, which
                allocates before there are any.

        Raises:
            ValueError: no room for so many; while gradients are recorded.
        """
        check_integer(f"{type(self).__name__}.open", 1, num_tokens=num_tokens)
        if like is not None:
            check_tensor(f"{type(self).__name__}.open", like=like)
            if like.dim() != 4:
                raise ValueError(
                    f"{type(self).__name__}.open: like must have shape (B, H, any, width), got "
                    f"{tuple(like.shape)}"
                )
        self._refuse_gradients()
        if self._end + num_tokens > self._max_tokens[0]:
            raise ValueError(
                f"cache: {num_tokens} tokens after {self._end} are more than its {self._max_tokens[0]}; make "
                "a new cache for every generation, a larger one for longer ones, or evict the oldest tokens"
            )
        self._past, self._end = self._end, self._end + num_tokens
        self._evaluations.clear()
        self._like = like if self._like is None else self._like

    def update(
        self,
        keys: Tensor,  # (B, H, l, any) of the open tokens
        values: Tensor,  # (B, H, l, any) of the open tokens
        layer: str = "",
        rows: slice | Tensor = ALL_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of the open tokens, and return those of all tokens up to them.

        Every call counts as an evaluation of its layer.

        Args:
            keys: (B, H, l, any), their heads and widths free.
            values: (B, H, l, any) likewise.
            layer: name of the attention layer, where there is more than one.
            rows: which sequences these are, a slice or indices (rows,); with `compact` of a layer pass
                `torch.arange(B)` as an input of the cell, and on to here.

        Returns:
            Keys and values, each (rows, H, tokens, any): views of the buffers, with indices copies.

        Raises:
            TypeError: `rows` are neither.
            ValueError: another number of tokens than are open, of sequences, heads, width, type or device
                than before; tokens before that this set of the layer has not seen; while gradients are
                recorded.
        """
        owner = f"{type(self).__name__}.update"
        check_tensor(owner, keys=keys, values=values)
        for name, new in (("keys", keys), ("values", values)):
            if new.dim() != 4:
                raise ValueError(f"{owner}: {name} must be (B, H, tokens, width), got {tuple(new.shape)}")
        check_instance(owner, str, "a name", layer=layer)
        evaluation = self._evaluations.get(layer, 0)
        held = self._held(layer, evaluation, (keys, values))
        for name, new, buffer in zip(("keys", "values"), (keys, values), held.buffers, strict=True):
            _check_new(name, new, buffer, self._end - self._past, rows)
        for new, buffer in zip((keys, values), held.buffers, strict=True):
            buffer[rows, self._past : self._end] = new.transpose(1, 2)
        self._evaluations[layer], held.num_tokens = evaluation + 1, self._end
        return self._attended(held, rows)

    def slot(self, layer: str, rows: slice = ALL_ROWS, evaluation: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, the room of the open tokens at their end, for the layer to write.

        It is `update` for layers that know which evaluation theirs is and are to see tensors alone, as
        compiled ones do. `open` was told what keys and values are like.

        Args:
            layer: name of the attention layer.
            rows: which sequences.
            evaluation: how often the layer was evaluated for the open tokens before.

        Returns:
            Keys and values, each (rows, H, tokens, head width), views of the buffers.

        Raises:
            ValueError: `open` was not told; else see `update`.
        """
        owner = f"{type(self).__name__}.slot"
        check_instance(owner, str, "a name", layer=layer)
        check_instance(owner, slice, "a slice", rows=rows)
        check_integer(owner, 0, evaluation=evaluation)
        if self._like is None:
            raise ValueError("cache: a slot is allocated by what `open(num_tokens, like)` is told; pass like")
        held = self._held(layer, evaluation, (self._like, self._like))
        held.num_tokens = self._end
        return self._attended(held, rows)

    def evict(self, num_tokens: int) -> None:
        """Forget the oldest tokens, and copy the others to the front.

        The others stay as they are: what they know of those that went is in their keys and values. Where a
        token stands is to be in its keys already, or in what it is embedded by, see `num_seen`.

        Args:
            num_tokens: how many go, at most `num_tokens` of the cache.

        Raises:
            ValueError: more than there are.
        """
        check_integer(f"{type(self).__name__}.evict", 0, num_tokens=num_tokens)
        if num_tokens > self._end:
            raise ValueError(
                f"evict: num_tokens must be at most {self._end}, all there are, got {num_tokens}"
            )
        for held in self._sets.values():
            kept = max(held.num_tokens - num_tokens, 0)
            for buffer in held.buffers:
                buffer[:, :kept] = buffer[:, num_tokens : num_tokens + kept].clone()
            held.num_tokens = kept
        self._past, self._end = max(self._past - num_tokens, 0), self._end - num_tokens
        self._num_evicted += num_tokens

    def reorder(self, rows: Tensor) -> None:
        """Let sequence i go on from what was sequence `rows[i]`.

        Beams split and end like this, and sequences that are complete leave the batch. Buffers move.

        Args:
            rows: (new B,) integers, each any number of times.

        Raises:
            ValueError: `rows` of another shape or type, or on a CPU out of range.
        """
        check_tensor("reorder", rows=rows)
        if rows.dim() != 1 or rows.dtype not in _INTEGERS:
            raise ValueError(
                f"reorder: rows must be integers of shape (new B,), got {rows.dtype} {tuple(rows.shape)}"
            )
        num_rows = min((len(held.buffers[0]) for held in self._sets.values()), default=None)
        if num_rows is not None and rows.device.type == "cpu" and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= num_rows:
                raise ValueError(
                    f"reorder: rows must be sequences 0 to {num_rows - 1}, got values from {low} to {high}"
                )
        for held in self._sets.values():
            keys, values = (_taken(buffer, rows, held.num_tokens) for buffer in held.buffers)
            held.buffers = keys, values
        self._like = None if self._like is None else self._like.index_select(0, rows)

    @property
    def num_tokens(self) -> int:
        """Tokens held at present, the open ones included."""
        return self._end

    @property
    def num_seen(self) -> int:
        """Tokens there were, evicted ones included: the position of the next."""
        return self._num_evicted + self._end

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for held in self._sets.values() for buffer in held.buffers)

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and values that hold a token already."""
        return sum(
            buffer[:, : held.num_tokens].nbytes for held in self._sets.values() for buffer in held.buffers
        )

    def _held(self, layer: str, evaluation: int, like: tuple[Tensor, Tensor]) -> _Set:
        """The set of a layer's evaluation, allocated where there is none."""
        self._refuse_gradients()
        number = self._set_of(evaluation)
        if number >= len(self._max_tokens):
            raise ValueError(
                f"cache: evaluation {evaluation + 1} of layer {layer!r} for the same tokens, and it has sets "
                f"for {len(self._max_tokens)}; call `open` before every call of the model, and solve by "
                f"Picard() with Stopping.steps({len(self._max_tokens)}), not measured"
            )
        if (layer, number) not in self._sets:
            keys, values = (_allocated(t, self._max_tokens[number]) for t in like)
            self._sets[layer, number] = _Set((keys, values))
        held = self._sets[layer, number]
        if held.num_tokens not in (self._past, self._end):
            raise ValueError(
                f"cache: layer {layer!r} has, for evaluation {evaluation + 1}, keys and values of "
                f"{held.num_tokens} of the {self._past} tokens before; every layer is to see every token, at "
                "no more loop steps than the tokens before, or use EquilibriumCache"
            )
        return held

    def _attended(self, held: _Set, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[rows, : self._end].transpose(1, 2) for buffer in held.buffers)
        return keys, values

    def _refuse_gradients(self) -> None:
        if torch.is_grad_enabled():
            raise ValueError(
                "cache: it is overwritten as tokens go on, so call under torch.no_grad(); to train, evaluate "
                "all tokens at once without one"
            )


class EquilibriumCache(KeyValueCache):
    """One set of keys and values a layer, whatever the number of loop steps.

    Token by token with it equals the joint solve once both converged; any solver, any number of steps.
    (For generation scale by scale: VIAR, arXiv 2605.01220.)

    Args:
        max_tokens: most tokens at a time.

    Raises:
        TypeError, ValueError: `max_tokens` is no integer of at least 1.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__([max_tokens])

    def _set_of(self, evaluation: int) -> int:
        return 0


class StepCache(KeyValueCache):
    """One set of keys and values a loop step: step i sees what step i of the tokens before saw.

    n steps for every token then equal n `Picard` steps on all tokens at once, far from convergence too, at n
    times the memory of `EquilibriumCache`. A call may take fewer steps than those before, never more.

    Args:
        max_tokens: most tokens at a time.
        num_steps: most loop steps.

    Raises:
        TypeError, ValueError: one of them is no integer of at least 1.
    """

    def __init__(self, max_tokens: int, num_steps: int) -> None:
        check_integer(type(self).__name__, 1, num_steps=num_steps)
        super().__init__([max_tokens] * num_steps)

    def _set_of(self, evaluation: int) -> int:
        return evaluation


def causal_mask(
    queries: Tensor,  # (B, ..., l, any)
    keys: Tensor,  # (B, ..., L, any)
    first: Tensor | None = None,  # (B,)
) -> Tensor | None:
    """Which keys each query sees, bool, where the queries are the last l of L tokens; `None`: all.

    For `attn_mask` of `torch.nn.functional.scaled_dot_product_attention`, whose `is_causal` takes the queries
    for the first l tokens instead.

    Args:
        queries: (B, ..., l, any), of new tokens.
        keys: (B, ..., L, any), of all tokens up to them.
        first: (B,) integers, which of the L tokens each sequence begins with, where sequences of several
            lengths were padded on the left; padding sees itself. Default: all begin with the first. Pass it
            on as an input of the cell; after `evict(n)` it is n less, and 0 at least.

    Returns:
        (l, L), or with `first` (B, 1, l, L).

    Raises:
        TypeError: no tensors, or `first` without integers.
        ValueError: `queries` or `keys` without tokens, or `first` of another shape.
    """
    for name, tensor in (("queries", queries), ("keys", keys)):
        check_tensor("causal_mask", **{name: tensor})
        if tensor.dim() < 2:
            raise ValueError(
                f"causal_mask: {name} must have shape (B, ..., tokens, any), got {tuple(tensor.shape)}"
            )
    if first is not None:
        check_tensor("causal_mask", first=first)
    devices = {tensor.device for tensor in (queries, keys, first) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"causal_mask: queries, keys and first must be on one device, got {sorted(map(str, devices))}"
        )
    num_new, num_tokens = queries.shape[-2], keys.shape[-2]
    if first is None and num_new == 1:
        return None
    last = num_tokens - num_new  # what the first query sees
    seen = torch.ones(num_new, num_tokens, dtype=torch.bool, device=keys.device).tril(last)
    if first is None:
        return seen
    if first.shape != queries.shape[:1]:
        raise ValueError(
            f"causal_mask: first must have shape (B,) = {tuple(queries.shape[:1])}, got {tuple(first.shape)}"
        )
    if first.dtype not in _INTEGERS:
        raise TypeError(f"causal_mask: first must hold integers, got {first.dtype}")
    begun = torch.arange(num_tokens, device=keys.device) >= first.view(-1, 1, 1, 1)
    # A query without any key gets no number where the softmax is spelled out, and its sequence fails.
    return seen & begun | seen.triu(last)


def _allocated(like: Tensor, max_tokens: int) -> Tensor:
    # Tokens before heads in memory: what one token adds is then in one piece.
    return like.new_empty(like.shape[0], max_tokens, like.shape[1], like.shape[3])


def _taken(buffer: Tensor, rows: Tensor, num_tokens: int) -> Tensor:
    taken = buffer.new_empty(len(rows), *buffer.shape[1:])
    taken[:, :num_tokens] = buffer[:, :num_tokens].index_select(0, rows)
    return taken


def _check_new(name: str, new: Tensor, buffer: Tensor, num_open: int, rows: slice | Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless these fit into the buffer as the open tokens of these rows."""
    if not (isinstance(rows, slice) or (isinstance(rows, Tensor) and rows.dtype in _INTEGERS)):
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(
            f"cache: rows must be a slice or a tensor of integers (rows,), the places of sequences, got {got}"
            "; of a mask pass mask.nonzero().squeeze(1)"
        )
    num_rows = len(rows) if isinstance(rows, Tensor) else len(range(*rows.indices(len(buffer))))
    expected = (num_rows, buffer.shape[2], num_open, buffer.shape[3])
    if new.shape != expected or (new.dtype, new.device) != (buffer.dtype, buffer.device):
        raise ValueError(
            f"cache: {name} must be (sequences, heads, open tokens, width) = {expected} in {buffer.dtype} "
            f"on {buffer.device}, got {tuple(new.shape)} in {new.dtype} on {new.device}; `reorder` changes "
            "which sequences there are, `open` says how many tokens come"
        )

"""Taking some samples out of what is known of a batch, and putting them back.

What is known of a batch may be any nest of dataclasses, tuples, lists and dicts. Its tensors have the batch
as their first axis; anything else belongs to the batch as a whole. A solver that keeps a state of some
samples alone wraps it in `Parts`, which say of which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Something that belongs to some samples: the tensors in `state` have `rows` as their batch."""

    rows: Tensor | None  # (b,), int64, places in the batch; `None`: all of it, in order
    state: Any


@dataclass(frozen=True)
class Parts:
    """States of some samples each. Every sample of the batch is in one part or in none."""

    items: tuple[Part, ...]

    def with_part(self, part: Part) -> Parts:
        """All parts, and one more."""
        return Parts((*self.items, part))

    def without_part(self, part: Part) -> Parts:
        """All parts but this one."""
        return Parts(tuple(other for other in self.items if other is not part))


def take_samples(state: Any, samples: Tensor) -> Any:
    """What is known of some samples alone; `samples` (b,), int64, are their places in the batch."""
    return _walk(lambda full, _: full.index_select(0, samples), lambda a, _: _take(a, samples), state, state)


def put_samples(state: Any, samples: Tensor, part: Any, batch: int) -> Any:
    """`state` with what is known of some samples replaced.

    Args:
        state: of all samples.
        samples: the places in the batch of those that are replaced, int64, (b,).
        part: what is known of them. What is not a tensor is taken from here.
        batch: number of all samples.

    A tensor may be missing in `state`, or be smaller there along an axis behind the batch; the samples that
    are not replaced get zeros then.
    """

    def put(full: Tensor | None, new: Tensor) -> Tensor:
        whole = new.new_zeros(batch, *new.shape[1:])
        if full is not None:
            whole[tuple(slice(size) for size in full.shape)] = full
        return whole.index_copy(0, samples, new)

    def put_parts(full: Parts, new: Parts) -> Parts:
        others = torch.ones(batch, dtype=torch.bool, device=samples.device).index_fill(0, samples, False)
        where = others.nonzero().squeeze(1)
        kept = [Part(where if p.rows is None else where[p.rows], p.state) for p in _take(full, where).items]
        moved = [Part(samples if p.rows is None else samples[p.rows], p.state) for p in new.items]
        return Parts((*kept, *moved))

    return _walk(put, put_parts, state, part)


def detached(state: Any) -> Any:
    """What is known of a batch, its tensors without the graphs they carry."""

    def cut(_: Any, parts: Parts) -> Parts:
        return Parts(tuple(Part(part.rows, detached(part.state)) for part in parts.items))

    return _walk(lambda _, tensor: tensor.detach(), cut, None, state)


def _take(parts: Parts, samples: Tensor) -> Parts:
    """The parts that have any of these samples, with places in the batch of these samples alone."""
    found = []
    for part in parts.items:
        if part.rows is None:
            found.append(Part(None, take_samples(part.state, samples)))
            continue
        places = torch.full((int(torch.cat([part.rows, samples]).max()) + 1,), -1, device=samples.device)
        places[samples] = torch.arange(len(samples), device=samples.device)
        new = places[part.rows]
        kept = (new >= 0).nonzero().squeeze(1)
        if len(kept):
            found.append(Part(new[kept], take_samples(part.state, kept)))
    return Parts(tuple(found))


def _walk(
    change: Callable[[Any, Tensor], Tensor],
    change_parts: Callable[[Any, Parts], Parts],
    state: Any,
    part: Any,
) -> Any:
    """`part` with every tensor replaced by what `change` makes of it and of its counterpart in `state`."""
    if isinstance(part, Tensor):
        return change(state, part)
    if isinstance(part, Parts):
        return change_parts(state, part)

    def walk(old: Any, new: Any) -> Any:
        return _walk(change, change_parts, old, new)

    if is_dataclass(part) and not isinstance(part, type):
        names = [f.name for f in fields(part)]
        return replace(
            part, **{name: walk(getattr(state, name, None), getattr(part, name)) for name in names}
        )
    if isinstance(part, dict):
        return {key: walk((state or {}).get(key), value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        missing = [None] * len(part)
        return type(part)(walk(old, new) for old, new in zip([*(state or ()), *missing], part, strict=False))
    return part

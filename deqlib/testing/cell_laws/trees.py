"""Pytrees of tensors whose first axis is the batch, or that belong to no sample."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..._torch import keystr, tree_flatten_with_path, tree_leaves, tree_map


def clone_of(leaf: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def rows_of(tree: Any, rows: Tensor) -> Any:
    """Some samples of a state."""
    return tree_map(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), tree)


def moved(leaf: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A tensor with normal noise added, in proportion to its size."""
    size = float(leaf.detach().double().square().mean().sqrt()) if leaf.numel() else 0.0
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    scale = share * size if math.isfinite(size) and size > 0 else share
    return leaf.detach() + (scale * noise).to(leaf)


def flat(tree: Any) -> Tensor:
    """All numbers of every sample, (B, D), float64."""
    rows = [leaf.detach().reshape(leaf.shape[0], leaf.shape[1:].numel()) for leaf in tree_leaves(tree)]
    return torch.cat([row.to("cpu", torch.float64) for row in rows], 1)


def finite_samples(tree: Any) -> Tensor:
    """Which samples are finite, bool (B,)."""
    return flat(tree).isfinite().all(1)


def is_finite(tree: Any) -> bool:
    """Whether all samples are."""
    return bool(finite_samples(tree).all())


def difference(found: Any, expected: Any) -> float:
    """Relative difference of the sample that differs most; not a number is as far as can be."""
    a, b = flat(found), flat(expected)
    apart = (a - b).norm(dim=1)
    largest = torch.where(apart == 0, 0.0, apart / b.norm(dim=1)).nan_to_num(nan=math.inf)
    return float(largest.max()) if len(largest) else 0.0


def named_tensors(name: str, tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree by their place in it."""
    leaves, _ = tree_flatten_with_path(tree)
    return {name + keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def weighted_sum(tree: Any) -> Tensor:
    """The sum of all numbers with random weights, a loss that depends on each."""
    generator = torch.Generator().manual_seed(7)
    parts = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)).sum()
        for leaf in tree_leaves(tree)
    ]
    return cast(Tensor, sum(parts))

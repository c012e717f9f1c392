"""Optimiser and schedules of VAR's training (arXiv 2404.02905, public code)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

WARM_UP = 0.02  # share of the run
FLAT = 0.05  # share of what follows the warm-up
FIRST_FACTOR, LAST_FACTOR = 0.005, 0.01  # of the learning rate


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear and convolution layers only.

    Biases, norms, embeddings, positions, codes, modulation offsets and attention scales are not decayed. A
    module with a number `lr_factor` learns at that share of the learning rate.

    Args:
        model: its parameters without `requires_grad` are left out.
        lr: learning rate.
        betas: of the two moments.
        weight_decay: of the groups of the optimiser whose entry `decayed` is true; the first is one.
    """
    decayed, factors = set(), {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            decayed.add(id(module.weight))
        if (factor := getattr(module, "lr_factor", 1.0)) != 1.0:
            factors.update(dict.fromkeys(map(id, module.parameters()), factor))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for p in parameters
                if (id(p) in decayed) == is_decayed and factors.get(id(p), 1.0) == factor
            ],
            "weight_decay": weight_decay if is_decayed else 0.0,
            "decayed": is_decayed,
            "lr_factor": factor,
        }
        for factor in (1.0, *sorted(set(factors.values())))
        for is_decayed in (True, False)
    ]
    # One kernel for all tensors: small models would spend a tenth of their time stepping them one by one.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_factor(progress: float) -> float:
    """Share of the learning rate at `progress` in [0, 1]: linear warm-up, flat, linear to the end."""
    if progress < WARM_UP:
        return FIRST_FACTOR + (1 - FIRST_FACTOR) * progress / WARM_UP
    rest = (progress - WARM_UP) / (1 - WARM_UP)
    if rest < FLAT:
        return 1.0
    return 1.0 + (LAST_FACTOR - 1.0) * (rest - FLAT) / (1 - FLAT)


def weight_decay_at(progress: float, first: float, last: float) -> float:
    """Weight decay at `progress` in [0, 1]: half a period of a cosine, from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def set_progress(
    optimizer: torch.optim.Optimizer, progress: float, *, lr: float, weight_decay: tuple[float, float]
) -> None:
    """Write learning rate and weight decay at `progress` into an optimiser of `build_optimizer`.

    Args:
        optimizer: changed in place.
        progress: how far the run is, 0 to 1.
        lr: highest learning rate, see `lr_factor`.
        weight_decay: first and last, see `weight_decay_at`.
    """
    for group in optimizer.param_groups:
        # Groups of a state that was saved before there were factors have none.
        group["lr"] = lr * lr_factor(progress) * group.get("lr_factor", 1.0)
        if group["decayed"]:
            group["weight_decay"] = weight_decay_at(progress, *weight_decay)

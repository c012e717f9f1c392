"""Models that read a sequence by a local cell, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .cells import LocalCell
from .contenders import MakeBody

Batch = tuple[Tensor, Tensor]  # inputs (B, length, features), classes (B,) or (B, length)


class Reader(nn.Module):
    """Classes at every place of a sequence: (B, length, features) -> (B, length, classes)."""

    def __init__(self, make_body: MakeBody, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.body = make_body(partial(LocalCell, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(self.embed(x)))
        return logits


def train(
    model: nn.Module,
    batch: Callable[[torch.Generator], Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    updates: int,
    seed: int,
    rate: float,
) -> None:
    """Adam, one cycle of the learning rate up to `rate`, gradients clipped to norm 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    for _ in range(updates):
        x, y = batch(generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x), y))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

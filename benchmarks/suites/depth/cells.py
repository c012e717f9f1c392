"""The cells that are stacked and iterated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 4


class Block(nn.Module):
    """A transformer block fed the input at every step, state and input (B, tokens, width).

    h = LN(z + attention(z + x)), next z = LN(h + W2 gelu(W1 h)), as in the deep equilibrium transformer
    (Bai et al. 2019, arXiv 1909.01377). Attention is written out: what it allocates is then the same on
    every machine.

    Args:
        width: of a token, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Next state, shape of `z`."""
        q, k, v = self.qkv(z + x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        h = self.first(z + self.mixed((weights @ v).transpose(1, 2).flatten(2)))
        image: Tensor = self.second(h + self.outer(nn.functional.gelu(self.inner(h))))
        return image


class LocalCell(nn.Module):
    """A cell in which a place sees itself and the place before it, state and input (B, length, width).

    LN(x + W2 relu(W1 [h before, h])) with h = z + x: what happens at a place reaches the next one in one
    evaluation, so n evaluations carry it n places far.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Next state, shape of `z`."""
        h = z + x
        before = nn.functional.pad(h, (0, 0, 1, 0))[:, :-1]
        image: Tensor = self.norm(x + self.outer(torch.relu(self.inner(torch.cat((before, h), -1)))))
        return image

"""The transformer block of VAR: attention and MLP, each modulated by the class (AdaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, KeyValue
from .config import TransformerConfig


class DropPath(nn.Module):
    """In training, drops the whole branch of a sample with probability `rate` and rescales the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; the first axis is the batch."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3g}"


class Block(nn.Module):
    """x += g1 attention(norm(x) (1 + s1) + b1), then x += g2 mlp(norm(x) (1 + s2) + b2).

    The six C-vectors g1, g2, s1, s2, b1, b2 come from the class, see `modulate`: from a projection of the
    block's own, or, with `shared_modulation`, from one projection for all blocks plus a learned offset.
    """

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        C, hidden = config.width, round(config.width * config.mlp_ratio)
        self.attention = Attention(C, config.num_heads, config.qk_norm)
        self.fc1 = nn.Linear(C, hidden)
        self.fc2 = nn.Linear(hidden, C)
        self.drop_path = DropPath(drop_path)
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, C))
        else:
            self.modulation = nn.Linear(C, 6 * C)
        self.shared_modulation = config.shared_modulation

    def modulate(
        self,
        cond: Tensor,  # (B, C) class embedding, or (B, 6, C) with shared modulation
    ) -> Tensor:
        """The six vectors, (6, B, 1, C). Constant over iterations, so computed once by the caller."""
        if self.shared_modulation:
            vectors_B6C = cond + self.modulation_offset.squeeze(0)
        else:
            vectors_B6C = self.modulation(F.silu(cond)).unflatten(1, (6, -1))
        return vectors_B6C.transpose(0, 1).unsqueeze(2)

    def forward(
        self,
        x_BLC: Tensor,
        modulation: Tensor,  # (6, B, 1, C)
        mask_LL: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Tokens (B, L, C), and their keys and values."""
        g1, g2, s1, s2, b1, b2 = modulation.unbind(0)
        attended, new = self.attention(norm(x_BLC) * (1 + s1) + b1, mask_LL, past)
        x_BLC = x_BLC + self.drop_path(g1 * attended)
        hidden = F.gelu(self.fc1(norm(x_BLC) * (1 + s2) + b2), approximate="tanh")
        return x_BLC + self.drop_path(g2 * self.fc2(hidden)), new


def norm(x_BLC: Tensor) -> Tensor:
    """LayerNorm without affine parameters, eps 1e-6."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=1e-6)

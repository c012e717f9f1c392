"""The transformer block of VAR: attention and MLP, each modulated by the class (AdaLN)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, KeyValue
from .config import TransformerConfig, filled
from .scales import BlockCausal

_GELU = 2 * math.sqrt(2 / math.pi)


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
        C = filled(config.width)
        hidden = round(C * config.mlp_ratio)
        self.attention = Attention(C, filled(config.num_heads), config.qk_norm)
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
        """g1, g2, 1 + s1, 1 + s2, b1, b2 as (6, B, 1, C). Constant over iterations: keep it."""
        if self.shared_modulation:
            vectors_B6C = cond + self.modulation_offset.squeeze(0)
        else:
            vectors_B6C = self.modulation(F.silu(cond)).unflatten(1, (6, -1))
        vectors_6B1C = vectors_B6C.transpose(0, 1).unsqueeze(2)
        return torch.cat([vectors_6B1C[:2], 1 + vectors_6B1C[2:4], vectors_6B1C[4:]])

    def forward(
        self,
        x_BLC: Tensor,
        modulation: Tensor,  # (6, B, 1, C), from `modulate`
        causal: BlockCausal | None = None,  # see `Attention.forward`
        slot: KeyValue | None = None,  # likewise
    ) -> Tensor:
        """Tokens (B, L, C)."""
        g1, g2, s1, s2, b1, b2 = modulation.unbind(0)
        attended = self.attention(torch.addcmul(b1, norm(x_BLC), s1), causal, slot)
        x_BLC = self._add(x_BLC, g1, attended)
        hidden = gelu(self.fc1(torch.addcmul(b2, norm(x_BLC), s2)))
        return self._add(x_BLC, g2, self.fc2(hidden))

    def _add(self, x_BLC: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        if self.training and self.drop_path.rate > 0:
            branch = self.drop_path(gate * branch)
            return x_BLC + branch
        return torch.addcmul(x_BLC, gate, branch)


def norm(x_BLC: Tensor) -> Tensor:
    """LayerNorm without affine parameters, eps 1e-6."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=1e-6)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form; overwrites its argument where no gradient is recorded."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    if x.device.type != "cpu":
        activated: Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
        return activated
    # The same function as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): a CPU has a sigmoid in less than
    # half the time of a tanh.
    gate = torch.addcmul(x.new_tensor(_GELU), x, x, value=0.044715 * _GELU)
    return x.mul_(gate.mul_(x).sigmoid_())

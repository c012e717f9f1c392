"""Multi-head self-attention without state: where its keys and values go is the caller's to say."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # keys and values, each (B, H, tokens, C / H)


class Attention(nn.Module):
    """Self-attention of VAR (arXiv 2404.02905).

    Queries and values have learned biases, keys none. With `qk_norm`, queries and keys have unit norm
    over the head and queries are multiplied by exp(min(log_scale, log 100)), one learned scale a head;
    without, the softmax scale is 0.25 / sqrt(C / H).
    """

    max_log_scale = math.log(100)

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4))) if qk_norm else None
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BLC: Tensor,
        mask_LL: Tensor | None = None,  # true where row may attend to column; None: everywhere
        slot: KeyValue | None = None,  # keys and values of earlier tokens, and room for those of `x_BLC`
    ) -> Tensor:
        """Attended tokens (B, L, C).

        With a `slot`, the last L places of its keys and values are written, and all of it is attended to.
        """
        B, L, C = x_BLC.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BLC, self.qkv.weight, bias.to(self.qkv.weight.dtype))
        q, k, v = qkv.view(B, L, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            # Factors instead of unit vectors: one pass each. Under autocast they come out in float32;
            # attention runs in the type of the values.
            q_norm, k_norm = (
                torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, k)
            )
            q = q * (self.log_scale.clamp_max(self.max_log_scale).exp() / q_norm).to(v.dtype)
            k = k * k_norm.reciprocal().to(v.dtype)
        if slot is not None:
            slot[0][:, :, -L:] = k
            slot[1][:, :, -L:] = v
            k, v = slot
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=self.scale)
        attended: Tensor = self.out(x.transpose(1, 2).reshape(B, L, C))
        return attended

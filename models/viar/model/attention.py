"""Multi-head self-attention without state: where its keys and values go is the caller's to say."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .execution import joined
from .scales import BlockCausal

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
        causal: BlockCausal | None = None,  # which tokens see which; None: all see all. Not with a slot
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
        groups = [(q, k, v, None)] if causal is None else query_groups(q, k, v, causal)
        # Projected group by group: what the projection keeps for its backward pass is then what attention
        # keeps for its own, and not a copy.
        parts = []
        for q, k, v, mask in groups:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            parts.append(self.out(x.transpose(1, 2).flatten(2)))
        return joined(parts, 1)


def query_groups(
    q: Tensor,  # (B, H, L, C / H), as the others
    k: Tensor,
    v: Tensor,
    causal: BlockCausal,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Queries of each group, the keys and values that they meet, and the mask between them, in order."""
    first, *others = q.split_with_sizes(causal.sizes, 2)
    groups: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
    # From the last group to the first, each one's keys and values cut off those of the next: autograd pads
    # their gradients to the length of the next group alone then, not to that of the sequence.
    for queries in reversed(others):
        groups.append((queries, k, v, None))
        k, v = (t[:, :, : -queries.shape[2]] for t in (k, v))
    return [(first, k, v, causal.mask_ll), *reversed(groups)]

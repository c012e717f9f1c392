"""Inference of VAR and VIAR the straightforward way: what the published program computes, call by call.

Sizes, weights and results are those of `viar`; how they are arrived at is what one would write first, and
what the published program does (VAR, arXiv 2404.02905; VIAR, arXiv 2605.01220):

- keys and values of every block are kept, the implicit block's once an iteration, and grown by `torch.cat`
- every block computes its modulation from the class whenever it is called, the head at every scale
- the implicit block projects concat(z, u) in full at every iteration
- rows with and without class go through the head; guidance combines their logits
- top-k masks logits, top-p sorts the whole codebook, `torch.multinomial` draws

Attention is PyTorch's fused one, on queries, keys and values from one linear. Quantizer and decoder are the
tokenizer's. Runs in the type of its weights, or in half precision under `torch.autocast`.

Shape letters: B rows (images with their class, then without), l tokens of a scale, C width, V codebook.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viar import NextScaleTransformer, Tokenizer, TransformerConfig
from viar.model.config import ImplicitTrunkConfig
from viar.model.scales import scale_slices
from viar.model.schedule import iteration_schedule

PREFIXES = (  # of names in `NextScaleTransformer.state_dict()`, and of ours
    (r"^trunk\.layer\.cell\.block\.", "implicit."),
    (r"^trunk\.layer\.cell\.projection_in\.", "implicit_projection.0."),
    (r"^trunk\.layer\.cell\.projection_out\.", "implicit_projection.2."),
    (r"^trunk\.blocks\.", "pre."),
    (r"^trunk\.", ""),
)


class CachedAttention(nn.Module):
    """Self-attention that keeps the keys and values of earlier scales, a set an iteration."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.empty(1, num_heads, 1, 1)) if qk_norm else None
        self.scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x_BlC: Tensor, iteration: int) -> Tensor:
        """Attend to `x_BlC` and to what this iteration kept before."""
        B, num_tokens, C = x_BlC.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BlC, self.qkv.weight, bias).view(B, num_tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            q = (F.normalize(q, dim=-1) * self.log_scale.clamp_max(math.log(100)).exp()).to(v.dtype)
            k = F.normalize(k, dim=-1).to(v.dtype)
        if iteration in self.kept:
            k = torch.cat([self.kept[iteration][0], k], dim=2)
            v = torch.cat([self.kept[iteration][1], v], dim=2)
        self.kept[iteration] = (k, v)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out_BlC: Tensor = self.out(attended.transpose(1, 2).reshape(B, num_tokens, C))
        return out_BlC


class ModulatedBlock(nn.Module):
    """Attention and MLP, modulated by the class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        C, num_heads = _sizes(config)
        hidden = round(C * config.mlp_ratio)
        self.attention = CachedAttention(C, num_heads, config.qk_norm)
        self.fc1, self.fc2 = nn.Linear(C, hidden), nn.Linear(hidden, C)
        self.shared = config.shared_modulation
        if self.shared:
            self.modulation_offset = nn.Parameter(torch.empty(1, 1, 6, C))
        else:
            self.modulation = nn.Linear(C, 6 * C)

    def forward(
        self,
        x_BlC: Tensor,
        condition: Tensor,  # (B, C), or (B, 6, C) where blocks share one modulation
        iteration: int = 0,
    ) -> Tensor:
        """(B, l, C)."""
        if self.shared:
            vectors = condition.unsqueeze(1) + self.modulation_offset
        else:
            vectors = self.modulation(F.silu(condition)).view(len(x_BlC), 1, 6, -1)
        gain1, gain2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
        x_BlC = x_BlC + gain1 * self.attention(_norm(x_BlC) * (1 + scale1) + shift1, iteration)
        hidden = F.gelu(self.fc1(_norm(x_BlC) * (1 + scale2) + shift2), approximate="tanh")
        out_BlC: Tensor = x_BlC + gain2 * self.fc2(hidden)
        return out_BlC


class Baseline(nn.Module):
    """The transformer. `of(model)` gives one with a model's weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        C, trunk, num_tokens = _sizes(config)[0], config.trunk, sum(side * side for side in config.sides)
        self.class_embed = nn.Embedding(config.num_classes + 1, C)
        self.pos_start = nn.Parameter(torch.empty(1, config.sides[0] ** 2, C))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, C))
        self.level_embed = nn.Embedding(len(config.sides), C)
        self.input_projection = nn.Linear(config.code_channels, C)
        self.shared_modulation = nn.Linear(C, 6 * C) if config.shared_modulation else None
        num_pre, num_post, self.implicit = config.depth, 0, None
        if isinstance(trunk, ImplicitTrunkConfig):
            num_pre, num_post, self.implicit = trunk.num_pre, trunk.num_post, ModulatedBlock(config)
            self.implicit_projection = nn.Sequential(
                nn.Linear(2 * C, 2 * C), nn.GELU(approximate="tanh"), nn.Linear(2 * C, C)
            )
        self.pre = nn.ModuleList(ModulatedBlock(config) for _ in range(num_pre))
        self.post = nn.ModuleList(ModulatedBlock(config) for _ in range(num_post))
        self.head_modulation = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, config.codebook_size)

    @classmethod
    def of(cls, model: NextScaleTransformer) -> Self:
        """With a copy of `model`'s weights, on its device, in evaluation mode."""
        with torch.device("meta"):
            baseline = cls(model.config)
        state = {_our_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
        baseline.load_state_dict(state, assign=True)
        return baseline.eval().requires_grad_(False)

    def forget(self) -> None:
        """Drop all keys and values."""
        for module in self.modules():
            if isinstance(module, CachedAttention):
                module.kept.clear()

    @property
    def cache_bytes(self) -> int:
        """Keys and values kept."""
        attentions = [module for module in self.modules() if isinstance(module, CachedAttention)]
        return sum(t.nbytes for a in attentions for pair in a.kept.values() for t in pair)

    def scale_logits(self, x_BlC: Tensor, embedding_BC: Tensor, condition: Tensor, iterations: int) -> Tensor:
        """Logits (B, l, V) of one scale's tokens; keys and values are kept for the next."""
        for block in self.pre:
            x_BlC = block(x_BlC, condition)
        if self.implicit is not None:
            u_BlC = x_BlC
            for i in range(iterations):
                x_BlC = self.implicit_projection(torch.cat([x_BlC, u_BlC], dim=-1))
                x_BlC = self.implicit(x_BlC, condition, i)
        for block in self.post:
            x_BlC = block(x_BlC, condition)
        scale, shift = self.head_modulation(F.silu(embedding_BC)).unsqueeze(1).chunk(2, dim=-1)
        logits_BlV: Tensor = self.head(_norm(x_BlC.float()) * (1 + scale) + shift)
        return logits_BlV.float()


@torch.no_grad()
def sample_tokens(
    baseline: Baseline,
    tokenizer: Tokenizer,
    labels: Tensor,
    iterations: int | tuple[int, int] | Sequence[int] | None,
    cfg: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> tuple[list[Tensor], Tensor]:
    """Sample all scales.

    Args:
        baseline: the transformer.
        tokenizer: lends its quantizer.
        labels: (B,) classes, on the device of the weights.
        iterations: as `viar.generate` takes them; `None` for an explicit trunk.
        cfg: guidance at the last scale.
        top_k: most likely tokens kept; 0 keeps all.
        top_p: probability kept; 0 keeps all.
        generator: source of randomness, on the device of the weights; `None`: PyTorch's own.

    Returns:
        K tensors (B, p_k^2) of tokens, and f_hat (B, Z, p_K, p_K).
    """
    config, quantizer = baseline.config, tokenizer.quantizer
    sides = config.sides
    schedule = [0] * len(sides)
    if iterations is not None:
        schedule = cast("list[int]", iteration_schedule(iterations, len(sides)))
    baseline.forget()
    embedding_BC = baseline.class_embed(torch.cat([labels, torch.full_like(labels, config.num_classes)]))
    levels = torch.cat([torch.full((side * side,), scale) for scale, side in enumerate(sides)])
    positions_1LC = baseline.level_embed(levels.to(labels.device)) + baseline.pos_embed
    f_hat = torch.zeros(len(labels), config.code_channels, sides[-1], sides[-1], device=labels.device)
    x_BlC = embedding_BC.unsqueeze(1) + baseline.pos_start + positions_1LC[:, : sides[0] ** 2]
    tokens = []
    for scale, (side, count) in enumerate(zip(sides, schedule, strict=True)):
        condition = embedding_BC
        if baseline.shared_modulation is not None:
            condition = baseline.shared_modulation(F.silu(embedding_BC)).unflatten(1, (6, -1))
        logits_BlV = baseline.scale_logits(x_BlC, embedding_BC, condition, count)
        strength = cfg * scale / max(len(sides) - 1, 1)
        cond, null = logits_BlV.chunk(2)
        tokens.append(draw((1 + strength) * cond - strength * null, top_k, top_p, generator))
        codes = quantizer.codebook(tokens[-1]).transpose(1, 2).reshape(len(labels), -1, side, side)
        f_hat = quantizer.accumulate(f_hat, codes, scale)
        if scale < len(sides) - 1:
            pooled_BlZ = quantizer.next_input(f_hat, scale).flatten(2).transpose(1, 2)
            where = scale_slices(sides)[scale + 1]
            x_BlC = (baseline.input_projection(pooled_BlZ) + positions_1LC[:, where]).repeat(2, 1, 1)
    return tokens, f_hat


def draw(logits_BlV: Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a position, (B, l)."""
    V = logits_BlV.shape[-1]
    if top_k:
        least = logits_BlV.topk(min(top_k, V)).values.amin(-1, keepdim=True)
        logits_BlV = logits_BlV.masked_fill(logits_BlV < least, -torch.inf)
    if top_p:
        ascending, order = logits_BlV.sort(-1)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[..., -1] = False
        logits_BlV = logits_BlV.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    probability = logits_BlV.softmax(-1).view(-1, V)
    return torch.multinomial(probability, 1, generator=generator).view(logits_BlV.shape[:2])


def _sizes(config: TransformerConfig) -> tuple[int, int]:
    """Width and heads, which every config has once it is made."""
    assert config.width is not None
    assert config.num_heads is not None
    return config.width, config.num_heads


def _norm(x_BlC: Tensor) -> Tensor:
    return F.layer_norm(x_BlC, x_BlC.shape[-1:], eps=1e-6)


def _our_name(name: str) -> str:
    for pattern, replacement in PREFIXES:
        name, replaced = re.subn(pattern, replacement, name)
        if replaced:
            break
    return name

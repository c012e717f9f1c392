"""Which token a position gets: top-k, top-p, and noise that belongs to an image.

Tokens are drawn with the Gumbel-max trick: the arg max of logits plus independent Gumbel noise is a sample
of their softmax. The noise of a token is a function of (seed, image, position, token), so an image does not
depend on what else is computed with it, and a logit that is off by a rounding error changes the choice only
where two candidates are as close as that. `choose` tells where this is so.

`mix` takes no token for a position but weighs all by the same noise: soft codes, for smoother pictures.

Shape letters: B images, l tokens of a scale, V codebook, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kinds import checked, shown
from ..model.execution import sent

ROUNDING = 1e-4  # logits; far above what float32 sums in another order differ by, far below what matters

# SplitMix64 (Steele, Lea, Flood 2014, figure 15), as the signed integers that torch has.
_GOLDEN, _MIX1, _MIX2 = (
    int(np.array(constant, np.uint64).astype(np.int64))
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class TokenNoise:
    """Gumbel noise of every token at every position of some images.

    Attributes:
        keys_B: one 64-bit key an image, int64.
    """

    keys_B: Tensor

    @classmethod
    def of_images(cls, num_images: int, seed: int, first_index: int, device: torch.device) -> TokenNoise:
        """Of images `first_index`, `first_index` + 1, ...; a key depends on `seed` and index alone."""
        keys = [
            np.random.Philox(key=[seed, first_index + i]).random_raw(1).astype(np.int64)[0]
            for i in range(num_images)
        ]
        return cls(sent(torch.tensor(keys, dtype=torch.int64, device="cpu"), device))

    def gumbel(
        self,
        tokens_Blk: Tensor,  # int64
        first_position: int,  # of the l, in the sequence of all scales
    ) -> Tensor:
        """Float32 (B, l, k), the same on every device up to rounding."""
        positions_l1 = torch.arange(tokens_Blk.shape[1], device=tokens_Blk.device).unsqueeze(1)
        bits = tokens_Blk + (positions_l1 + first_position).bitwise_left_shift_(32)
        bits.add_(1).mul_(_GOLDEN).add_(self.keys_B.view(-1, 1, 1))
        bits.bitwise_xor_(_shifted(bits, 30)).mul_(_MIX1)
        bits.bitwise_xor_(_shifted(bits, 27)).mul_(_MIX2)
        bits.bitwise_xor_(_shifted(bits, 31))
        # The upper 24 bits are what float32 can hold; half a step keeps both ends out of the logarithms.
        uniform = _shifted(bits, 40).float().add_(0.5).mul_(2.0**-24)
        return uniform.log_().neg_().log_().neg_()


class Choice(NamedTuple):
    """What `choose` returns."""

    tokens: Tensor  # (B, l) int64
    certain: Tensor  # (B,) bool: no logit off by less than `ROUNDING` / 2 would change any of the tokens


class Mixture(NamedTuple):
    """What `mix` returns."""

    tokens: Tensor  # (B, l) int64, the one of most weight
    weights_BlV: Tensor  # float32, of each token; they sum to 1


class _Candidates(NamedTuple):
    """Tokens that come into question; where not all do, the most likely ones, by falling logit."""

    values_Blk: Tensor  # their logits
    tokens_Blk: Tensor
    inside: Tensor  # (B, l, k) bool, whether they may be chosen
    doubtful: Tensor  # (B, l, k) bool, in or out by no more than rounding


@checked
def choose(
    logits_BlV: Tensor,  # float32
    noise: TokenNoise,
    first_position: int,
    top_k: int | None,
    top_p: float | None,
) -> Choice:
    """Sample a token at each position, from the `top_k` most likely, of them the `top_p` most likely.

    `top_p` counts the probability that `top_k` leaves; a token stays if those more likely than it have less
    than `top_p` together, so the most likely one always does.

    Raises:
        ValueError: logits of another shape or type, noise of other images, no candidates.
    """
    V = logits_BlV.shape[-1] if logits_BlV.ndim == 3 else 0
    k = V if top_k is None else min(top_k, V)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], or None to keep all tokens, got {top_p}")
    if k < 1 or not logits_BlV.is_floating_point():
        raise ValueError(
            "logits, top_k: expected floating-point (B, l, V) and at least 1 of the V tokens, got "
            f"{shown(logits_BlV)} and {top_k}"
        )
    if len(noise.keys_B) != len(logits_BlV):
        raise ValueError(f"noise: expected that of {len(logits_BlV)} images, got {len(noise.keys_B)} keys")
    if k == 1:
        values, tokens = logits_BlV.topk(min(2, V))
        return Choice(tokens[..., 0], _apart(values))
    values, tokens_Blk, inside, doubtful = _candidates(logits_BlV, k, top_p)
    noisy = values + noise.gumbel(tokens_Blk, first_position)
    chosen = noisy.masked_fill(~inside, -torch.inf).argmax(-1, keepdim=True)
    possible = noisy.masked_fill_(~(inside | doubtful), -torch.inf).topk(min(2, noisy.shape[-1]))
    certain = _apart(possible.values) & ~doubtful.gather(-1, chosen).flatten(1).any(1)
    certain &= (possible.indices[..., :1] == chosen).flatten(1).all(1)
    return Choice(tokens_Blk.gather(-1, chosen).squeeze(-1), certain)


def mix(
    logits_BlV: Tensor,  # float32
    noise: TokenNoise,
    first_position: int,
    top_k: int | None,
    top_p: float | None,
    *,
    progress: float,
) -> Mixture:
    """Weigh the tokens that `choose` may choose, by a Gumbel softmax that hardens from scale to scale.

    With r = `progress`, the weights are softmax((logits (1 + r) + noise) / t), t = max(0.27 (1 - 0.95 r),
    0.005). (Jang et al. 2017, arXiv 1611.01144; the two ramps: `more_smooth` of VAR's public code, arXiv
    2404.02905.)

    Args:
        logits_BlV: (B, l, V) float32.
        noise: of these images.
        first_position: of the l, in the sequence of all scales.
        top_k: see `choose`.
        top_p: see `choose`.
        progress: from 0 at the first scale to 1 at the last.
    """
    V = logits_BlV.shape[-1]
    values, tokens_Blk, inside, _ = _candidates(logits_BlV, V if top_k is None else min(top_k, V), top_p)
    noisy = values * (1 + progress) + noise.gumbel(tokens_Blk, first_position)
    noisy = noisy.masked_fill_(~inside, -torch.inf)
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    weights_Blk = (noisy / temperature).softmax(-1)
    heaviest = noisy.argmax(-1, keepdim=True)
    return Mixture(
        tokens_Blk.gather(-1, heaviest).squeeze(-1),
        torch.zeros_like(logits_BlV).scatter_(-1, tokens_Blk, weights_Blk),
    )


def _candidates(logits_BlV: Tensor, k: int, top_p: float | None) -> _Candidates:
    """The `k` most likely tokens, of them the `top_p` most likely; see `choose`."""
    V = logits_BlV.shape[-1]
    share = 1.0 if top_p is None else top_p
    nucleus = share < 1
    if k < V or nucleus:
        # One candidate more than asked for shows whether the last one is in by more than rounding.
        values, tokens_Blk = logits_BlV.topk(min(k + 1, V))
    else:
        values, tokens_Blk = logits_BlV, torch.arange(V, device=logits_BlV.device).expand(logits_BlV.shape)
    # The candidates that are in come first, by falling logit.
    inside = torch.ones_like(values, dtype=torch.bool)
    inside[..., k:] = False
    doubtful = torch.zeros_like(inside)  # in or out by no more than rounding
    if nucleus:
        before = values[..., :k].softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = -1  # the most likely one is in, however small the share
        inside[..., :k] &= before < share
        doubtful[..., :k] = (before - share).abs() < ROUNDING
    if k < V or nucleus:
        size = inside.sum(-1, keepdim=True)
        last_in = values.gather(-1, size - 1)
        first_out = values.gather(-1, size.clamp_max(values.shape[-1] - 1))
        first_out = first_out.masked_fill_(size == values.shape[-1], -torch.inf)
        doubtful |= torch.where(inside, values - first_out, last_in - values) < ROUNDING
    return _Candidates(values, tokens_Blk, inside, doubtful)


def _apart(descending_Bl2: Tensor) -> Tensor:
    """Whether the first of two values is clear of the second at every position, (B,)."""
    if descending_Bl2.shape[-1] == 1:
        return torch.ones(len(descending_Bl2), dtype=torch.bool, device=descending_Bl2.device)
    return (descending_Bl2[..., 0] - descending_Bl2[..., 1] > ROUNDING).flatten(1).all(1)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return bits.bitwise_right_shift(count).bitwise_and_((1 << (64 - count)) - 1)

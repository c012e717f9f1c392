"""Multi-scale residual quantizer (arXiv 2404.02905, algorithms 1 and 2).

A feature map f is written as a sum over K scales. Scale k looks at what the scales before it left over,
shrinks that to p_k x p_k, replaces each vector by its nearest code, enlarges the codes to p_K x p_K,
refines them with a convolution phi and subtracts the result. `f_hat` is the running sum.

Shape letters: B batch, K scales of side p_1 < ... < p_K, L = sum of p_k squared, V codebook size,
Z code channels, N any number of vectors, p = p_k, h = w = p_K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kinds import check_kind, check_tensor
from ..model.config import TokenizerConfig
from ..model.execution import fails_on_device, in_type_of
from ..precision import full_float32
from .kmeans import drawn_order, kmeans, nearest, replaced

USAGE_DECAY = 0.99  # of the moving average of code hits
IN_USE_SHARE = 0.03  # of a uniform share of the hits; a code above it counts as in use


class QuantizerOutput(NamedTuple):
    """What `MultiScaleQuantizer.quantize` returns."""

    f_hat: Tensor  # (B, Z, p_K, p_K) float32, gradient goes straight through to the features
    tokens: list[Tensor]  # K of (B, p_k * p_k) int64, row by row
    loss: Tensor  # scalar: codebook and commitment loss, mean over the scales
    vectors: Tensor  # (B * L, Z) without gradient: the residual vectors that were quantized, scale by scale
    left: Tensor  # (K,) without gradient: share of the features' mean square that is left after each scale


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which of `num_phi` shared convolutions the 0-based `scale` of `num_scales` uses.

    Convolution i sits at tick i of `num_phi` evenly spaced ticks in (0, 1) and a scale at
    `scale / (num_scales - 1)` takes the nearest, the lower one of two equally near. `num_phi=0` gives
    every scale its own. The rule is that of VAR's public code, whose checkpoints depend on it.
    """
    if num_phi == 0:
        return scale
    if num_phi == 1 or num_scales == 1:
        return 0
    # The first of Q ticks is 1 / 2Q from the end, but 1 / 3Q of the published four. Scale 2 of 10 lies half
    # way between two of those, so rounding decides, and the order of these operations has to stay.
    first = 1 / (3 if num_phi == 4 else 2) / num_phi
    last = 1 - first
    spacing = (last - first) / (num_phi - 1)
    ticks = [first + index * spacing for index in range(num_phi - 1)] + [last]
    position = scale / (num_scales - 1)
    return min(range(num_phi), key=lambda index: abs(ticks[index] - position))


@contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """Inside of this, float32 is float32: no autocast, and on a GPU no TensorFloat32.

    The residuals of late scales are small, so that lower precision would pick other codes.
    """
    with torch.autocast(device_type=like.device.type, enabled=False):
        if not like.is_cuda:  # a compiler of code for CPUs could not look into what follows
            yield
            return
        with full_float32("cuda", "conv", "matmul"):
            yield


class MultiScaleQuantizer(nn.Module):
    """Codebook, refinement convolutions and the arithmetic between features, tokens and f_hat.

    All arithmetic is float32, under autocast too. Codes start uniform in [-1/V, 1/V], near zero, so that
    the first residuals are the features themselves; `init_codebook` then starts from data. The
    convolutions start as the identity, so that a scale adds just the codes that are nearest to what was left.

    `usage` (K, V) is a moving average (decay 0.99) of the hits of each code at each scale in a batch,
    updated by `quantize` in training mode only; zeros until then.
    """

    usage: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        check_kind("config: expected", config, TokenizerConfig)
        self.sides = config.sides
        self.num_phi = config.num_phi
        self.phi_ratio = config.phi_ratio
        self.commitment = config.commitment
        self.codebook = nn.Embedding(config.codebook_size, config.code_channels)
        nn.init.uniform_(self.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        self.phi = nn.ModuleList(
            _identity_conv(config.code_channels) for _ in range(config.num_phi or len(config.sides))
        )
        self.register_buffer("usage", torch.zeros(len(config.sides), config.codebook_size))

    def phi_for(self, scale: int) -> nn.Module:
        """Refinement convolution of the 0-based `scale`."""
        return self.phi[phi_index(scale, len(self.sides), self.num_phi)]

    def quantize(self, features_BZhw: Tensor) -> QuantizerOutput:
        """Quantize for training.

        The loss is the mean over the scales of
        `commitment * mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f))`, where sg stops the gradient and f_hat_k
        is the sum of the first k scales. In training mode `usage` is updated.

        Raises:
            ValueError: `features_BZhw` is not (B, Z, p_K, p_K).
        """
        self.check_feature_map("features", features_BZhw)
        f_BZhw = features_BZhw.float()
        loss = f_BZhw.new_zeros(())
        tokens, vectors, errors = [], [], []
        for scale, (tokens_Bl, vectors_NZ, f_hat_BZhw) in enumerate(self._residual_steps(f_BZhw)):
            tokens.append(tokens_Bl)
            vectors.append(vectors_NZ)
            loss = loss + self.commitment * F.mse_loss(f_hat_BZhw.detach(), f_BZhw)
            error = F.mse_loss(f_hat_BZhw, f_BZhw.detach())
            loss = loss + error
            errors.append(error.detach())
            if self.training:
                self._record_usage(tokens_Bl, scale)
        return QuantizerOutput(
            f_hat=f_BZhw + (f_hat_BZhw - f_BZhw).detach(),
            tokens=tokens,
            loss=loss / len(self.sides),
            vectors=torch.cat(vectors),
            left=torch.stack(errors) / f_BZhw.detach().square().mean(),
        )

    @torch.no_grad()
    def encode(self, features_BZhw: Tensor) -> list[Tensor]:
        """Tokens of a feature map (B, Z, p_K, p_K): K tensors (B, p_k * p_k) int64, row by row.

        Raises:
            ValueError: `features_BZhw` has another shape.
        """
        self.check_feature_map("features", features_BZhw)
        return [tokens_Bl for tokens_Bl, _, _ in self._residual_steps(features_BZhw.float())]

    def accumulate(self, f_hat_BZhw: Tensor, embeddings_BZpp: Tensor, scale: int) -> Tensor:
        """Add one scale to the running sum, not in place.

        Args:
            f_hat_BZhw: (B, Z, p_K, p_K), sum of the scales before; zeros at the first.
            embeddings_BZpp: (B, Z, p, p) with p the side of `scale`, codes or mixtures of codes.
            scale: 0-based.

        Returns:
            (B, Z, p_K, p_K) float32.

        Raises:
            ValueError: a shape or `scale` does not fit.
        """
        self.check_feature_map("f_hat", f_hat_BZhw)
        self._check_scale(scale, len(self.sides))
        check_tensor("embeddings", embeddings_BZpp)
        expected = (f_hat_BZhw.shape[0], f_hat_BZhw.shape[1], self.sides[scale], self.sides[scale])
        if embeddings_BZpp.shape != expected:
            raise ValueError(
                f"embeddings must have shape {expected} at scale {scale}, got {tuple(embeddings_BZpp.shape)}"
            )
        if not embeddings_BZpp.is_floating_point() or embeddings_BZpp.device != f_hat_BZhw.device:
            raise ValueError(
                f"embeddings must be floating point on {f_hat_BZhw.device}, got {embeddings_BZpp.dtype} on "
                f"{embeddings_BZpp.device}"
            )
        return f_hat_BZhw.float() + self._refine(embeddings_BZpp, scale)

    def embed(self, tokens_Bl: Tensor) -> Tensor:
        """Codes of one scale's tokens (B, p * p) as a map (B, Z, p, p); carries gradient to the codebook."""
        side = int(tokens_Bl.shape[1] ** 0.5)
        codes_BZpp: Tensor = self.codebook(tokens_Bl).transpose(1, 2).unflatten(2, (side, side))
        return codes_BZpp

    def embed_mixture(self, weights_BlV: Tensor) -> Tensor:
        """Mixtures of codes at one scale's positions, (B, p * p, V) of weights, as a map (B, Z, p, p)."""
        side = int(weights_BlV.shape[1] ** 0.5)
        with _full_precision(weights_BlV):
            mixed_BlZ = weights_BlV @ self.codebook.weight.to(weights_BlV.dtype)
        return torch.unflatten(mixed_BlZ.transpose(1, 2), 2, (side, side))

    def decode_tokens(self, tokens: Sequence[Tensor]) -> Tensor:
        """Sum of the scales given: f_hat, (B, Z, p_K, p_K) float32.

        Args:
            tokens: (B, p_k * p_k) of the first scales, at least one and at most K; int64 or int32.

        Raises:
            ValueError: see `check_tokens`.
        """
        self.check_tokens(tokens)
        *_, f_hat_BZhw = self._partial_sums(tokens)
        return f_hat_BZhw

    @torch.no_grad()
    def next_scale_inputs(self, tokens: Sequence[Tensor]) -> Tensor:
        """What a next-scale transformer is fed under teacher forcing: (B, L - p_1 ** 2, Z) float32.

        After each scale but the last, `next_input` of the running sum, row by row, concatenated.

        Args:
            tokens: (B, p_k * p_k) of all K scales; the last one's values are not used.

        Raises:
            ValueError: see `check_tokens`; a prefix of the scales is not enough.
        """
        self.check_tokens(tokens, all_scales=True)
        pieces = [
            self.next_input(f_hat_BZhw, scale).flatten(2).transpose(1, 2)
            for scale, f_hat_BZhw in enumerate(self._partial_sums(tokens[:-1]))
        ]
        if not pieces:
            return self.codebook.weight.new_zeros(tokens[0].shape[0], 0, self.codebook.embedding_dim)
        return torch.cat(pieces, dim=1)

    def next_input(self, f_hat_BZhw: Tensor, scale: int) -> Tensor:
        """The running sum after the 0-based `scale`, averaged down to the side of the next scale.

        (B, Z, p_K, p_K) to (B, Z, p, p).

        Raises:
            ValueError: the shape does not fit or no scale follows `scale`.
        """
        self.check_feature_map("f_hat", f_hat_BZhw)
        self._check_scale(scale, len(self.sides) - 1)
        return self._shrink(f_hat_BZhw, scale + 1)

    def codebook_usage(self) -> list[float]:
        """Fraction of the codebook in use at each of the K scales.

        A code is in use where its moving average of hits exceeds 3 % of a uniform share of the scale's
        hits. Zeros before the first training step.
        """
        in_use: list[float] = in_use_share(self.usage).tolist()
        return in_use

    def total_codebook_usage(self) -> float:
        """Fraction of the codebook in use when the hits of all scales are taken together."""
        return in_use_share(self.usage.sum(0)).item()

    @torch.no_grad()
    def init_codebook(self, vectors_NZ: Tensor, *, generator: torch.Generator) -> None:
        """Set the codes to those that k-means finds for `vectors_NZ`, and forget their use.

        A vector of scale k weighs (p_K / p_k) ** 2, the positions of the feature map that it stands for. Each
        scale then counts as much as any other. Unweighted, the last scale, with half of the vectors, would
        take almost all codes, and the first begin with one or two. Vectors that are not all finite change
        nothing: no code would be left after them.

        Args:
            vectors_NZ: at least V vectors, `QuantizerOutput.vectors` of a first batch.
            generator: source of the draws.

        Raises:
            ValueError: fewer than V vectors, not Z channels, or not all vectors of a batch.
        """
        num_codes = self.codebook.num_embeddings
        weights_N = self._areas(vectors_NZ, least=num_codes)
        is_finite = vectors_NZ.isfinite().all()
        codes_VZ = kmeans(vectors_NZ, weights_N, num_codes, generator=generator)
        self.codebook.weight.copy_(torch.where(is_finite, codes_VZ, self.codebook.weight))
        self.usage.copy_(torch.where(is_finite, 0.0, self.usage))

    @torch.no_grad()
    def revive_dead_codes(
        self, vectors_NZ: Tensor, *, threshold: float = IN_USE_SHARE, generator: torch.Generator
    ) -> Tensor:
        """Replace codes that are hardly ever chosen by vectors that the codebook represents badly.

        A code is dead where its hits, over all scales, are below `threshold` times a uniform share. It
        becomes one of `vectors_NZ`, each used at most once, and its usage becomes the uniform share of
        every scale, so that it has time to find its place. Vectors are drawn by their squared distance from
        the nearest code times the positions they stand for, see `init_codebook`. With fewer vectors than dead
        codes the rest stay dead until the next call. Before the first training step no code is dead, and
        vectors that are not all finite revive none.

        An optimiser's moments of the revived rows are not touched. Where several processes hold the
        codebook, give each the same vectors and a generator in the same state.

        Args:
            vectors_NZ: `QuantizerOutput.vectors` of the last batch.
            threshold: in units of a uniform share.
            generator: source of the draw.

        Returns:
            Number of codes replaced, int64 scalar on the codebook's device.

        Raises:
            ValueError: no vectors, not Z channels, or not all vectors of a batch.
        """
        weights_N = self._areas(vectors_NZ, least=1)
        codes_VZ = self.codebook.weight
        hits_V = self.usage.sum(0)
        squares_N, _ = nearest(vectors_NZ, codes_VZ.to(vectors_NZ.dtype))
        far_NZ = vectors_NZ[drawn_order(weights_N * squares_N, generator)]
        dead_V = (hits_V < threshold * hits_V.mean()) & vectors_NZ.isfinite().all()
        new_VZ, revived_V = replaced(codes_VZ, dead_V, far_NZ)
        codes_VZ.copy_(new_VZ)
        self.usage.copy_(torch.where(revived_V, self.usage.mean(1, keepdim=True), self.usage))
        return revived_V.sum()

    def check_feature_map(self, name: str, value: Tensor) -> None:
        """Raise `ValueError` unless `value`, called `name`, is (B, Z, p_K, p_K) floating point."""
        check_tensor(name, value)
        expected = (self.codebook.embedding_dim, self.sides[-1], self.sides[-1])
        if value.ndim != 4 or tuple(value.shape[1:]) != expected or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape (B, {', '.join(map(str, expected))}), "
                f"got {value.dtype} {tuple(value.shape)}"
            )

    def check_tokens(self, tokens: Sequence[Tensor], *, all_scales: bool = False) -> None:
        """Raise `ValueError` unless `tokens` holds one (B, p_k * p_k) tensor of codes a scale.

        From one to K scales, or exactly K where `all_scales`; int64 or int32; values in [0, V). Values on a
        CUDA device are not read, for which the host would have to wait: wrong ones end with a device-side
        assertion when their codes are looked up.
        """
        most = len(self.sides)
        least = most if all_scales else 1
        if not isinstance(tokens, list | tuple) or not least <= len(tokens) <= most:
            got = f"{len(tokens)} scales" if isinstance(tokens, list | tuple) else type(tokens).__name__
            count = str(most) if all_scales else f"1 to {most}"
            raise ValueError(f"tokens must be a list of {count} tensors, one a scale, got {got}")
        size = self.codebook.num_embeddings
        for scale, tokens_Bl in enumerate(tokens):
            check_tensor(f"tokens[{scale}]", tokens_Bl)
        batch = tokens[0].shape[0] if tokens[0].ndim else 0
        for scale, (tokens_Bl, side) in enumerate(zip(tokens, self.sides, strict=False)):
            if tokens_Bl.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"tokens[{scale}] must be int64 or int32, got {tokens_Bl.dtype}")
            if tokens_Bl.shape != (batch, side * side):
                raise ValueError(
                    f"tokens[{scale}] must have shape {(batch, side * side)}, got {tuple(tokens_Bl.shape)}"
                )
            if tokens_Bl.numel() and not fails_on_device(tokens_Bl):
                low, high = int(tokens_Bl.min()), int(tokens_Bl.max())
                if low < 0 or high >= size:
                    raise ValueError(f"tokens[{scale}] must be codes in [0, {size}), got {low} to {high}")

    def _residual_steps(self, f_BZhw: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield tokens, the vectors they stand for and f_hat, scale by scale."""
        rest_BZhw = f_BZhw.detach()
        f_hat_BZhw = torch.zeros_like(rest_BZhw)
        for scale in range(len(self.sides)):
            vectors_NZ = self._shrink(rest_BZhw, scale).permute(0, 2, 3, 1).flatten(0, 2)
            tokens_Bl = self._nearest(vectors_NZ).view(len(f_BZhw), self.sides[scale] ** 2)
            h_BZhw = self._refine(self.embed(tokens_Bl), scale)
            f_hat_BZhw = f_hat_BZhw + h_BZhw
            rest_BZhw = rest_BZhw - h_BZhw.detach()
            yield tokens_Bl, vectors_NZ, f_hat_BZhw

    def _partial_sums(self, tokens: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield f_hat after each scale."""
        f_hat_BZhw: Tensor | float = 0.0
        for scale, tokens_Bl in enumerate(tokens):
            f_hat_BZhw = f_hat_BZhw + self._refine(self.embed(tokens_Bl), scale)
            yield f_hat_BZhw

    @torch.no_grad()
    def _nearest(self, vectors_NZ: Tensor) -> Tensor:
        """Index of the code nearest to each vector in Euclidean distance, (N,)."""
        codes_VZ = self.codebook.weight.to(vectors_NZ.dtype)
        with _full_precision(vectors_NZ):
            # |v - c|^2 less |v|^2, which is the same for every code.
            return torch.addmm(codes_VZ.square().sum(1), vectors_NZ, codes_VZ.T, alpha=-2).argmin(1)

    def _refine(self, embeddings_BZpp: Tensor, scale: int) -> Tensor:
        """A scale's summand of f_hat: its codes h enlarged to p_K, then (1 - r) h + r phi(h)."""
        h_BZhw = embeddings_BZpp.float()
        if scale < len(self.sides) - 1:
            h_BZhw = F.interpolate(h_BZhw, size=(self.sides[-1], self.sides[-1]), mode="bicubic")
        with _full_precision(h_BZhw):
            refined_BZhw = in_type_of(h_BZhw, self.phi_for(scale))(h_BZhw)
            return (1 - self.phi_ratio) * h_BZhw + self.phi_ratio * refined_BZhw

    def _shrink(self, x_BZhw: Tensor, scale: int) -> Tensor:
        """Average a (B, Z, p_K, p_K) map down to the side of `scale`."""
        if scale == len(self.sides) - 1:
            return x_BZhw
        return F.interpolate(x_BZhw, size=(self.sides[scale], self.sides[scale]), mode="area")

    @torch.no_grad()
    def _record_usage(self, tokens_Bl: Tensor, scale: int) -> None:
        """Move the average of one scale's hits towards those of this batch."""
        usage_V = self.usage[scale]
        ones_N = usage_V.new_ones(tokens_Bl.numel())
        hits_V = torch.zeros_like(usage_V).index_add_(0, tokens_Bl.flatten(), ones_N)
        # The first batch is copied, because averaged with zeros it would count for little. The device decides
        # which batch is the first, so that no step waits for the answer.
        usage_V.lerp_(hits_V, torch.where(usage_V.any(), 1 - USAGE_DECAY, 1.0).to(usage_V))

    def _check_scale(self, scale: int, count: int) -> None:
        if not 0 <= scale < count:
            raise ValueError(f"scale must be in [0, {count}), got {scale}")

    def _areas(self, vectors_NZ: Tensor, least: int) -> Tensor:
        """Positions of the feature map that each vector of a batch stands for, (N,) like the vectors.

        Raises `ValueError` unless these are the vectors of some images, scale by scale, at least `least`.
        """
        channels, length = self.codebook.embedding_dim, sum(side * side for side in self.sides)
        if vectors_NZ.ndim != 2 or vectors_NZ.shape[1] != channels or len(vectors_NZ) < least:
            raise ValueError(
                f"vectors must have shape (N, {channels}) with N at least {least}, "
                f"got {tuple(vectors_NZ.shape)}; a larger batch gives more"
            )
        if len(vectors_NZ) % length:
            raise ValueError(
                f"vectors must be those of whole images, {length} of each, got {len(vectors_NZ)}; give "
                "`vectors` as `quantize` returns them"
            )
        batch = len(vectors_NZ) // length
        parts = [
            vectors_NZ.new_full((batch * side * side,), (self.sides[-1] / side) ** 2) for side in self.sides
        ]
        return torch.cat(parts)


def _identity_conv(channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution that gives back what it is given."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
    nn.init.dirac_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def in_use_share(usage: Tensor) -> Tensor:
    """Share of codes with more than `IN_USE_SHARE` of a uniform share of the hits, (..., V) to (...)."""
    return (usage > IN_USE_SHARE * usage.mean(-1, keepdim=True)).float().mean(-1)


def perplexity(usage: Tensor) -> Tensor:
    """Exponential of the entropy of the hits, (..., V) to (...): as many codes in equal use would have it.

    1 where one code has all the hits, V where all have as many; 1 without hits.
    """
    share = usage / usage.sum(-1, keepdim=True).clamp(min=torch.finfo(usage.dtype).tiny)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()

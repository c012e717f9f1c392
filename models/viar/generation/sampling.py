"""Generation, scale by scale, for both trunks.

Shape letters: B images, K scales of side p_k, L = sum p_k^2 tokens, V codebook, Z code channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from ..model.config import TokenizerConfig, TransformerConfig
from ..model.execution import sent
from ..model.scales import scale_slices
from ..model.schedule import Iterations
from ..model.transformer import NextScaleTransformer
from ..model.trunk import ScaleSolve
from ..tokenizer import Tokenizer
from .choice import TokenNoise, choose, mix
from .guidance import Guidance, guidance_ramp
from .report import GenerationReport, ScaleReport
from .settings import Sampling, as_sampling, check_index

# Pixels decoded at a time: enough to keep a device busy.
DECODED_PIXELS = {"cpu": 2**16, "cuda": 2**19}

CacheName = Literal["equilibrium", "iterate"]

# (scale, sampled embeddings (B, Z, p_k, p_k)) -> embeddings to go on with
Replace = Callable[[int, Tensor], Tensor]
# (scale, f_hat (B, Z, p_K, p_K) with that scale added) -> f_hat to go on with
Hold = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """What the sampler made.

    Attributes:
        tokens: sampled tokens, K tensors (B, p_k^2); with `more_smooth` those of most weight in each mixture.
        f_hat: sum of all scales, (B, Z, p_K, p_K): what the image is decoded from. With `more_smooth` it is
            not that of the tokens, and there is no other trace of the mixtures.
        certain: (B,) bool, whether no token of an image hangs on rounding, see `viar.generation.choice`:
            computed in float32 in a batch of another size, it gets the same tokens. Nowhere with
            `more_smooth`, where an image is the same up to rounding.
        cache_bytes: keys and values held at the end, which is their peak.
        scales: what each scale took, if it was measured.
    """

    tokens: list[Tensor]
    f_hat: Tensor
    certain: Tensor
    cache_bytes: int
    scales: tuple[ScaleReport, ...] = ()


@overload
def generate(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    *,
    iterations: Iterations | None = ...,
    cfg: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    first_index: int = ...,
    cache: CacheName = ...,
    warm_start: bool = ...,
    guidance_reuse: int = ...,
    more_smooth: bool = ...,
    return_report: Literal[False] = ...,
) -> Tensor: ...
@overload
def generate(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    *,
    iterations: Iterations | None = ...,
    cfg: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    seed: int = ...,
    first_index: int = ...,
    cache: CacheName = ...,
    warm_start: bool = ...,
    guidance_reuse: int = ...,
    more_smooth: bool = ...,
    return_report: Literal[True],
) -> tuple[Tensor, GenerationReport]: ...
def generate(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    *,
    iterations: Iterations | None = None,
    cfg: float = 1.5,
    top_k: int | None = 900,
    top_p: float | None = 0.96,
    seed: int = 0,
    first_index: int = 0,
    cache: CacheName = "equilibrium",
    warm_start: bool = False,
    guidance_reuse: int = 0,
    more_smooth: bool = False,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, GenerationReport]:
    """Images of the classes asked for.

    Image i depends on (`seed`, `first_index` + i) and its label, not on the rest of the batch.

    Args:
        model: VAR or VIAR, of the tokenizer's sizes.
        tokenizer: turns tokens into images.
        labels: (B,) classes in [0, N]; N asks for no class in particular.
        iterations: of the implicit block at each scale: an int, (first, last), a list, `Adaptive` or
            `Budget`; default the config's. An explicit trunk takes none.
        cfg: guidance, rising linearly from 0 at the first scale to this at the last; 0 switches it off.
        top_k: keep the most likely tokens only; `None`, or a number above V, keeps all; 1 is argmax.
        top_p: keep the smallest set of tokens with at least this probability; `None` keeps all.
        seed: non-negative.
        first_index: index of the first image, to generate one series in several calls.
        cache: "equilibrium" or "iterate", see `viar.model.cache`.
        warm_start: start the implicit block at each scale where the scale before suggests, instead of at the
            output of the blocks before it. Other results with few iterations, the same at convergence.
        guidance_reuse: so many of the last scales are computed with their class alone; the direction of
            guidance is that of the scale before them, enlarged. Saves half their time; an approximation.
        more_smooth: a position gets a mixture of codes instead of one, see `viar.generation.choice.mix`:
            smoother pictures for the eye. They are not samples of the model, so metrics are not for them.
        return_report: return (images, `GenerationReport`); measuring waits for the device at every scale.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: an argument out of range; model and tokenizer of different sizes.
    """
    sampling = Sampling(
        iterations=iterations,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cache=cache,
        warm_start=warm_start,
        guidance_reuse=guidance_reuse,
        more_smooth=more_smooth,
    )
    sample = sample_tokens(model, tokenizer, labels, sampling, first_index=first_index, measure=return_report)
    start = time.perf_counter()
    images = decode_images(tokenizer, sample)
    if not return_report:
        return images
    return images, GenerationReport(sample.scales, _since(start, images.device))


@torch.no_grad()
def decode_images(tokenizer: Tokenizer, sample: Sample) -> Tensor:
    """Images of a sample, (B, 3, H, W) in [0, 1]; a few at a time, so that memory does not grow with B."""
    pixels = DECODED_PIXELS.get(sample.f_hat.device.type, DECODED_PIXELS["cuda"])
    chunk = max(1, pixels // tokenizer.config.image_side**2)
    return torch.cat(
        [tokenizer.decode_f_hat(part).add_(1).div_(2) for part in torch.split(sample.f_hat, chunk)]
    )


@torch.no_grad()
def sample_tokens(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    sampling: Sampling | None = None,
    *,
    first_index: int = 0,
    measure: bool = False,
    replace: Replace | None = None,
    hold: Hold | None = None,
) -> Sample:
    """The sampler under `generate` and `edit`: tokens instead of images.

    Args:
        model: VAR or VIAR, of the tokenizer's sizes, in evaluation mode.
        tokenizer: whose quantizer sums the scales up.
        labels: (B,) classes in [0, N]; N asks for no class in particular.
        sampling: how to sample; default `Sampling()`.
        first_index: index of the first image, to generate one series in several calls.
        measure: fill in `Sample.scales`; waits for the device at every scale.
        replace: sees the embeddings sampled at each scale and returns those to go on with; default all.
        hold: the same with f_hat once they are added.

    Raises:
        ValueError, TypeError: an argument out of range; model and tokenizer of different sizes; a model in
            training mode.
    """
    sampling = as_sampling(sampling)
    check_pair(model, tokenizer)
    check_index("first_index", first_index)
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    device, sides, quantizer = model.pos_embed.device, model.config.sides, tokenizer.quantizer
    labels = torch.as_tensor(labels)
    model.check_labels(labels)  # before they are on the device, where reading them would have to wait
    labels = sent(labels, device)
    predictor = _Predictor(model, sampling, labels, measure)
    noise = TokenNoise.of_images(len(labels), sampling.seed, first_index, device)
    certain = torch.full((len(labels),), not sampling.more_smooth, device=device)
    f_hat = torch.zeros(len(labels), model.config.code_channels, sides[-1], sides[-1], device=device)
    next_input: Tensor | None = None
    tokens, scales = [], []
    for scale, where in enumerate(scale_slices(sides)):
        start = time.perf_counter()
        logits_BlV = predictor.predict(scale, next_input)
        candidates = (logits_BlV, noise, where.start, sampling.top_k, sampling.top_p)
        if sampling.more_smooth:
            mixture = mix(*candidates, progress=guidance_ramp(scale, len(sides)))
            tokens.append(mixture.tokens)
            embeddings = quantizer.embed_mixture(mixture.weights_BlV)
        else:
            choice = choose(*candidates)
            tokens.append(choice.tokens)
            certain &= choice.certain
            embeddings = quantizer.embed(choice.tokens)
        f_hat = quantizer.accumulate(f_hat, replace(scale, embeddings) if replace else embeddings, scale)
        f_hat = hold(scale, f_hat) if hold else f_hat
        if scale < len(sides) - 1:
            next_input = quantizer.next_input(f_hat, scale)
        if measure:
            scales.append(predictor.report(scale, _since(start, device)))
    return Sample(tokens, f_hat, certain, predictor.cache.num_bytes, tuple(scales))


class _Predictor:
    """What the model says of one scale after another: owns the cache and all that scales have in common."""

    def __init__(
        self, model: NextScaleTransformer, sampling: Sampling, labels: Tensor, measure: bool
    ) -> None:
        self.model, self.warm_start, self.measure = model, sampling.warm_start, measure
        self.schedule = sampling.schedule(model.trunk)
        self.cache = model.trunk.new_cache(sampling.cache, self.schedule)
        self.guidance = Guidance(sampling.cfg, model.config.sides, len(labels), reuse=sampling.guidance_reuse)
        self.embedding_BC, cond = model.condition(self.guidance.labels(labels, model.null_class))
        self.modulations = model.trunk.modulate(cond.to(model.trunk.weight_type))
        self.head_modulation = model.modulate_head(self.embedding_BC)
        self.solve: ScaleSolve | None = None  # of the last scale

    def predict(self, scale: int, next_input: Tensor | None) -> Tensor:
        """Logits (B, l, V) of a scale from `MultiScaleQuantizer.next_input` of the one before."""
        model, samples = self.model, slice(self.guidance.num_samples(scale))
        if next_input is not None and self.guidance.num_samples(scale) > len(next_input):
            next_input = next_input.repeat(2, 1, 1, 1)
        x_BlC = model.embed_scale(scale, self.embedding_BC[samples], next_input)
        output = model.trunk(
            x_BlC,
            {name: modulation[:, samples] for name, modulation in self.modulations.items()},
            cache=self.cache,
            iterations=self.schedule[scale],
            displacement=self.solve.displacement if self.solve and self.warm_start else None,
            measure=self.measure,
        )
        self.solve = output.solve
        hidden_BlC = model.head_input(output.x_BLC, self.head_modulation[:, samples])
        return model.classify(self.guidance.guide(scale, hidden_BlC))

    def report(self, scale: int, seconds: float) -> ScaleReport:
        """What the last scale took."""
        solve = self.solve
        return ScaleReport(
            side=self.model.config.sides[scale],
            evaluations=None if solve is None else float(solve.evaluations.double().mean()),
            residual=None if solve is None or solve.residual is None else float(solve.residual.max()),
            seconds=seconds,
            cache_bytes=self.cache.used_bytes,
        )


def _since(start: float, device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def check_pair(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` unless the transformer speaks the tokenizer's language."""
    check_same_sizes(model.config, tokenizer.config)


def check_same_sizes(model: TransformerConfig, tokenizer: TokenizerConfig) -> None:
    """The same of their settings: raise `ValueError` unless sides and codes agree."""
    for name in ("sides", "codebook_size", "code_channels"):
        ours, theirs = getattr(model, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(
                f"tokenizer: its {name} is {theirs}, the model's is {ours}; they must be the same"
            )

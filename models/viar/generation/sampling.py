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

from ..model.cache import EquilibriumCache
from ..model.scales import resize_tokens, scale_slices
from ..model.schedule import Iterations
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .choice import TokenNoise, choose
from .report import GenerationReport, ScaleReport

# Pixels decoded at a time: enough to keep a device busy.
DECODED_PIXELS = {"cpu": 2**16, "cuda": 2**19}

# (scale, sampled embeddings (B, Z, p_k, p_k)) -> embeddings to go on with
Replace = Callable[[int, Tensor], Tensor]
# (scale, f_hat (B, Z, p_K, p_K) with that scale added) -> f_hat to go on with
Hold = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """What the sampler made.

    Attributes:
        tokens: sampled tokens, K tensors (B, p_k^2).
        f_hat: sum of all scales, (B, Z, p_K, p_K).
        certain: (B,) bool, whether no token of an image hangs on rounding, see `viar.generation.choice`:
            computed in float32 in a batch of another size, it gets the same tokens.
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
    cache: str = ...,
    warm_start: bool = ...,
    guidance_reuse: int = ...,
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
    cache: str = ...,
    warm_start: bool = ...,
    guidance_reuse: int = ...,
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
    cache: str = "equilibrium",
    warm_start: bool = False,
    guidance_reuse: int = 0,
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
        return_report: return (images, `GenerationReport`); measuring waits for the device at every scale.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: an argument out of range; model and tokenizer of different sizes.
    """
    sample = sample_tokens(
        model,
        tokenizer,
        labels,
        iterations=iterations,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        first_index=first_index,
        cache=cache,
        warm_start=warm_start,
        guidance_reuse=guidance_reuse,
        measure=return_report,
    )
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
    return torch.cat([tokenizer.decode_f_hat(part).add_(1).div_(2) for part in sample.f_hat.split(chunk)])


@torch.no_grad()
def sample_tokens(
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
    cache: str = "equilibrium",
    warm_start: bool = False,
    guidance_reuse: int = 0,
    measure: bool = False,
    replace: Replace | None = None,
    hold: Hold | None = None,
) -> Sample:
    """The sampler under `generate` and `edit`: same arguments, tokens instead of images.

    `measure` fills `Sample.scales`. `replace`, if given, sees the embeddings sampled at each scale and
    returns those to go on with; `hold` does the same with f_hat once they are added.
    """
    check_pair(model, tokenizer)
    check_sampling(cfg, top_k, top_p, seed, first_index)
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    device = model.pos_embed.device
    labels = torch.as_tensor(labels, device=device)
    model.check_labels(labels)
    sides, quantizer, guided = model.config.sides, tokenizer.quantizer, cfg != 0
    check_reuse(guidance_reuse, cfg, len(sides))
    schedule = model.trunk.schedule(iterations)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    memory = model.trunk.new_cache(cache, schedule, measure=measure, warm_start=warm_start)

    embedding_BC, cond = model.condition(both)
    head_modulation = model.modulate_head(embedding_BC)
    slices = scale_slices(sides)
    noise = TokenNoise.of_images(len(labels), seed, first_index, device)
    certain = torch.ones(len(labels), dtype=torch.bool, device=device)
    f_hat = torch.zeros(len(labels), model.config.code_channels, sides[-1], sides[-1], device=device)
    next_input: Tensor | None = None
    direction_BlC: Tensor | None = None  # of guidance, kept where a later scale reuses it
    tokens, scales = [], []
    for scale, where in enumerate(slices):
        start = time.perf_counter()
        strength = cfg * guidance_ramp(scale, len(sides))
        reuse = scale >= len(sides) - guidance_reuse
        samples = slice(len(labels)) if reuse else slice(None)
        if next_input is not None and guided and not reuse:
            next_input = next_input.repeat(2, 1, 1, 1)
        x_BLC = model.embed_scale(scale, embedding_BC[samples], next_input)
        x_BLC = model.trunk(x_BLC, cond[samples], cache=memory, iterations=schedule[scale])
        hidden_BlC = model.head_input(x_BLC, head_modulation[:, samples])
        if reuse:
            assert direction_BlC is not None
            direction_BlC = resize_tokens(direction_BlC, sides[scale])
            hidden_BlC = hidden_BlC + strength * direction_BlC
        elif guided:
            # The head is linear: guiding what it takes guides the logits, at half the work.
            if guidance_reuse:
                direction_BlC = hidden_BlC[: len(labels)] - hidden_BlC[len(labels) :]
            hidden_BlC = guide(hidden_BlC, strength)
        choice = choose(model.head(hidden_BlC), noise, where.start, top_k, top_p)
        tokens.append(choice.tokens)
        certain &= choice.certain
        embeddings = quantizer.embed(choice.tokens)
        if replace is not None:
            embeddings = replace(scale, embeddings)
        f_hat = quantizer.accumulate(f_hat, embeddings, scale)
        if hold is not None:
            f_hat = hold(scale, f_hat)
        if scale < len(sides) - 1:
            next_input = quantizer.next_input(f_hat, scale)
        if measure:
            scales.append(_report(sides[scale], memory, _since(start, device)))
    return Sample(tokens, f_hat, certain, memory.num_bytes, tuple(scales))


def _report(side: int, cache: EquilibriumCache, seconds: float) -> ScaleReport:
    solve = cache.solves[-1] if cache.solves else None
    return ScaleReport(
        side=side,
        evaluations=None if solve is None else float(solve.evaluations.double().mean()),
        residual=None if solve is None or solve.residual is None else float(solve.residual.max()),
        seconds=seconds,
        cache_bytes=cache.used_bytes,
    )


def _since(start: float, device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def guidance_ramp(scale: int, num_scales: int) -> float:
    """Share of the guidance at a scale: linear from 0 to 1; 1 where there is one scale only."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0


def guide(
    both_2BlC: Tensor,  # with the class, then without
    strength: float,
) -> Tensor:
    """Classifier-free guidance: (1 + t) cond - t null, (B, l, C). (Ho & Salimans, arXiv 2207.12598.)"""
    cond, null = both_2BlC.chunk(2)
    return torch.lerp(null, cond, 1 + strength) if strength else cond


def check_pair(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` unless the transformer speaks the tokenizer's language."""
    for name in ("sides", "codebook_size", "code_channels"):
        ours, theirs = getattr(model.config, name), getattr(tokenizer.config, name)
        if ours != theirs:
            raise ValueError(
                f"tokenizer: its {name} is {theirs}, the model's is {ours}; they must be the same"
            )


def check_sampling(cfg: float, top_k: int | None, top_p: float | None, seed: int, first_index: int) -> None:
    """Raise `ValueError` for a sampling setting out of range."""
    if not cfg >= 0:
        raise ValueError(f"cfg: expected a number of at least 0, got {cfg}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None to keep all tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], or None to keep all tokens, got {top_p}")
    for name, value in (("seed", seed), ("first_index", first_index)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name}: expected an integer from 0 to 2**63 - 1, got {value}")


def check_reuse(guidance_reuse: int, cfg: float, num_scales: int) -> None:
    """Raise `ValueError` unless so many last scales can reuse the guidance of one before."""
    if not 0 <= guidance_reuse < num_scales or (guidance_reuse and cfg == 0):
        raise ValueError(
            f"guidance_reuse: expected 0 to {num_scales - 1} of the {num_scales} scales, and guidance to "
            f"reuse, got {guidance_reuse} with cfg={cfg}"
        )

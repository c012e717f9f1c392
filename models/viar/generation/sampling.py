"""Generation, scale by scale, for both trunks.

Shape letters: B images, K scales of side p_k, L = sum p_k^2 tokens, V codebook, Z code channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..kinds import check_kind
from ..model.config import TokenizerConfig, TransformerConfig
from ..model.execution import sent
from ..model.schedule import Adaptive, Iterations
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .choice import TokenNoise
from .graphs import Parts, replayed, why_eager
from .report import GenerationReport
from .scalewise import Generation, Hold, Replace, Sample, seconds_since
from .settings import Sampling, as_labels, as_sampling, check_index

# Pixels decoded at a time: enough to keep a device busy.
DECODED_PIXELS = {"cpu": 2**16, "cuda": 2**19}

CacheName = Literal["equilibrium", "iterate"]


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
    check_kind("return_report: expected", return_report, bool)
    sample = sample_tokens(model, tokenizer, labels, sampling, first_index=first_index, measure=return_report)
    start = time.perf_counter()
    images = decode_images(tokenizer, sample)
    if not return_report:
        return images
    return images, GenerationReport(sample.scales, seconds_since(start, images.device))


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
    check_kind("replace: expected", replace, Replace | None)
    check_kind("measure: expected", measure, bool)
    check_kind("hold: expected", hold, Hold | None)
    work = _prepared(model, tokenizer, labels, sampling, first_index)
    graphs = model.graphs  # another thread may take them off
    if graphs is not None:
        parts = Parts.of(model, tokenizer)
        in_the_way = why_eager(parts, work.schedule, measure=measure, edits=bool(replace or hold))
        if in_the_way is None:
            return replayed(graphs, model, tokenizer, parts, *work)
        graphs.tell(in_the_way)
    generation = Generation(model, tokenizer, *work, measure=measure)
    for scale in range(len(model.config.sides)):
        generation.run(scale, replace, hold)
    return generation.sample()


@torch.no_grad()
def grow_images(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    sampling: Sampling | None = None,
    *,
    first_index: int = 0,
) -> Iterator[tuple[Tensor, GenerationReport]]:
    """Images on their way: what they look like after each scale, and the report so far.

    The last ones are those of `generate`. Decoding at every scale costs that much more than `generate`; the
    report counts the last time alone. CUDA graphs are not used.

    Args:
        model: VAR or VIAR, of the tokenizer's sizes, in evaluation mode.
        tokenizer: turns the sum of the scales so far into images.
        labels: (B,) classes in [0, N]; N asks for no class in particular.
        sampling: how to sample; default `Sampling()`.
        first_index: index of the first image, to generate one series in several calls.

    Returns:
        After each scale images (B, 3, H, W) in [0, 1], and the report of the scales up to it.

    Raises:
        ValueError, TypeError: when the first is asked for, as `sample_tokens`.
    """
    generation = Generation(
        model, tokenizer, *_prepared(model, tokenizer, labels, sampling, first_index), measure=True
    )
    for scale in range(len(model.config.sides)):
        generation.run(scale)
        start = time.perf_counter()
        images = decode_images(tokenizer, generation.sample())
        seconds = seconds_since(start, images.device)
        yield images, GenerationReport(tuple(generation.reports), seconds)


class _Prepared(NamedTuple):
    """What a generation needs beside model and tokenizer, in the order that `Generation` takes it."""

    sampling: Sampling
    schedule: list[int] | list[Adaptive] | list[None]
    labels: Tensor  # (B,) int64, on the model's device
    noise: TokenNoise


def _prepared(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor | Sequence[int],
    sampling: Sampling | None,
    first_index: int,
) -> _Prepared:
    sampling = as_sampling(sampling)
    check_pair(model, tokenizer)
    check_index("first_index", first_index)
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    device = model.pos_embed.device
    labels = as_labels(labels)
    model.check_labels(labels)  # before they are on the device, where reading them would have to wait
    labels = sent(labels, device).long()  # narrower ones cannot be looked up
    noise = TokenNoise.of_images(len(labels), sampling.seed, first_index, device)
    return _Prepared(sampling, sampling.schedule(model.trunk), labels, noise)


def check_pair(model: NextScaleTransformer, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` unless the transformer speaks the tokenizer's language.

    Raises:
        TypeError: one of them is none.
    """
    check_kind("model: expected", model, NextScaleTransformer)
    check_kind("tokenizer: expected", tokenizer, Tokenizer)
    check_same_sizes(model.config, tokenizer.config)


def check_same_sizes(model: TransformerConfig, tokenizer: TokenizerConfig) -> None:
    """The same of their settings: raise `ValueError` unless sides and codes agree."""
    for name in ("sides", "codebook_size", "code_channels"):
        ours, theirs = getattr(model, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(
                f"tokenizer: its {name} is {theirs}, the model's is {ours}; they must be the same"
            )

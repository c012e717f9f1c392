"""Generation, scale by scale, for both trunks.

Shape letters: B images, K scales of side p_k, L = sum p_k^2 tokens, V codebook, Z code channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import TokenNoise, choose
from .iterations import Iterations
from .scales import scale_slices
from .tokenizer import Tokenizer
from .transformer import NextScaleTransformer

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
        certain: (B,) bool, whether no token of an image hangs on rounding, see `viar.choice`: computed in
            float32 in a batch of another size, it gets the same tokens.
        cache_bytes: keys and values held at the end, which is their peak.
    """

    tokens: list[Tensor]
    f_hat: Tensor
    certain: Tensor
    cache_bytes: int


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
) -> Tensor:
    """Images of the classes asked for.

    Image i depends on (`seed`, `first_index` + i) and its label, not on the rest of the batch.

    Args:
        model: VAR or VIAR, of the tokenizer's sizes.
        tokenizer: turns tokens into images.
        labels: (B,) classes in [0, N]; N asks for no class in particular.
        iterations: of the implicit block at each scale: an int, (first, last), a list, or `Adaptive`;
            default the config's. An explicit trunk takes none.
        cfg: guidance, rising linearly from 0 at the first scale to this at the last; 0 switches it off.
        top_k: keep the most likely tokens only; `None`, or a number above V, keeps all; 1 is argmax.
        top_p: keep the smallest set of tokens with at least this probability; `None` keeps all.
        seed: non-negative.
        first_index: index of the first image, to generate one series in several calls.
        cache: "equilibrium" or "iterate", see `viar.cache`.

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
    )
    return decode_images(tokenizer, sample)


@torch.no_grad()
def decode_images(tokenizer: Tokenizer, sample: Sample) -> Tensor:
    """Images of a sample, (B, 3, H, W) in [0, 1]."""
    return tokenizer.decode_f_hat(sample.f_hat).add(1).div(2)


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
    replace: Replace | None = None,
    hold: Hold | None = None,
) -> Sample:
    """The sampler under `generate` and `edit`: same arguments, tokens instead of images.

    `replace`, if given, sees the embeddings sampled at each scale and returns those to go on with; `hold`
    does the same with f_hat once they are added.
    """
    check_pair(model, tokenizer)
    check_sampling(cfg, top_k, top_p, seed, first_index)
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    device = model.pos_embed.device
    labels = torch.as_tensor(labels, device=device)
    model.check_labels(labels)
    schedule = model.trunk.schedule(iterations)
    memory = model.trunk.new_cache(cache, schedule)

    sides, quantizer = model.config.sides, tokenizer.quantizer
    guided = cfg != 0
    both = torch.cat([labels, torch.full_like(labels, model.null_class)]) if guided else labels
    embedding_BC, cond = model.condition(both)
    slices = scale_slices(sides)
    noise = TokenNoise.of_images(len(labels), seed, first_index, device)
    certain = torch.ones(len(labels), dtype=torch.bool, device=device)
    f_hat = torch.zeros(len(labels), model.config.code_channels, sides[-1], sides[-1], device=device)
    next_input, tokens = None, []
    for scale, where in enumerate(slices):
        x_BLC = model.embed_scale(scale, embedding_BC, next_input)
        x_BLC = model.trunk(x_BLC, cond, cache=memory, iterations=schedule[scale])
        logits_BlV = model.logits(x_BLC, embedding_BC)
        if guided:
            logits_BlV = guide(logits_BlV, cfg * guidance_ramp(scale, len(sides)))
        choice = choose(logits_BlV, noise, where.start, top_k, top_p)
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
            if guided:
                next_input = next_input.repeat(2, 1, 1, 1)
    return Sample(tokens=tokens, f_hat=f_hat, certain=certain, cache_bytes=memory.num_bytes)


def guidance_ramp(scale: int, num_scales: int) -> float:
    """Share of the guidance at a scale: linear from 0 to 1; 1 where there is one scale only."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0


def guide(
    logits_2BlV: Tensor,  # with the class, then without
    strength: float,
) -> Tensor:
    """Classifier-free guidance: (1 + t) cond - t null, (B, l, V). (Ho & Salimans, arXiv 2207.12598.)"""
    cond, null = logits_2BlV.chunk(2)
    return (1 + strength) * cond - strength * null


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

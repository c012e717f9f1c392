"""The choice of a token: which may be chosen, how often, and how firmly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from viar.generation.choice import ROUNDING, TokenNoise, choose, mix

CPU = torch.device("cpu")


def noise_of(num_images: int = 1, seed: int = 0, first_index: int = 0) -> TokenNoise:
    return TokenNoise.of_images(num_images, seed, first_index, CPU)


def drawn(logits: Tensor, count: int, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`count` tokens of logits (V,), at as many positions of one image."""
    return choose(logits.expand(1, count, -1), noise_of(), 0, top_k, top_p).tokens[0]


def kept_tokens(logits: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Which tokens of (V,) may be chosen and with what probability, by the definition, in float64."""
    probability = logits.double().softmax(0)
    order = probability.argsort(descending=True).tolist()
    if top_k is not None:
        order = order[:top_k]
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[order] = True
    probability = torch.where(kept, probability, 0)
    probability /= probability.sum()
    if top_p is not None:
        kept[:] = False
        mass = 0.0
        for token in order:  # the smallest set with at least this probability, most likely first
            kept[token] = True
            mass += float(probability[token])
            if mass >= top_p:
                break
        probability = torch.where(kept, probability, 0)
        probability /= probability.sum()
    return kept, probability


# Which, and how often


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.05, 1.0),
)
def test_tokens_are_drawn_from_the_top_k_and_top_p_set_with_their_probabilities(
    values: list[int], top_k: int | None, top_p: float | None
) -> None:
    logits = torch.tensor(values) * 0.3  # no two alike: then the sets are unique
    kept, probability = kept_tokens(logits, top_k, top_p)
    if top_p is not None:  # where rounding decides which token is the last one, nothing can be said
        full = kept_tokens(logits, top_k, None)[1].sort(descending=True).values.cumsum(0)
        assume(float((full[:-1] - top_p).abs().min()) > 1e-5 if len(full) > 1 else True)
    count = 4096
    counts = drawn(logits, count, top_k, top_p).bincount(minlength=len(values))
    assert not counts[~kept].any()
    spread = (probability * (1 - probability) / count).sqrt()
    assert ((counts / count - probability).abs() <= 5 * spread + 1 / count).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, 4),
        (None, 1.0, 4),
        (None, 0.75, 3),  # exactly reached: the next token is not needed
        (None, 0.5, 2),
        (None, 0.51, 3),
        (None, 0.25, 1),
        (None, 0.01, 1),
        (2, None, 2),
        (99, None, 4),
        (4, None, 4),
    ],
)
def test_equal_logits_show_the_boundaries_of_top_k_and_top_p(
    top_k: int | None, top_p: float | None, expected: int
) -> None:
    assert len(drawn(torch.zeros(4), 64, top_k, top_p).unique()) == expected


@pytest.mark.parametrize("top_p", [1e-3, 1e-9, 1e-30])
def test_the_most_likely_token_stays_however_small_top_p_is(top_p: float) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert drawn(logits, 100, top_p=top_p).unique() == logits.argmax()


def test_top_p_counts_the_probability_left_by_top_k() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the two that top-k keeps the first has 4/7: above 0.5, so it alone stays; alone it has 0.4
    assert drawn(logits, 64, top_k=2, top_p=0.5).unique().tolist() == [0]
    assert drawn(logits, 64, top_p=0.5).unique().tolist() == [0, 1]


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_top_k_of_one_is_argmax_whatever_the_noise(values: list[float], top_p: int) -> None:
    logits = torch.tensor(values)
    tokens = drawn(logits, 20, top_k=1, top_p=top_p / 40)
    assert (logits[tokens] == logits.max()).all()


@given(
    st.lists(st.sampled_from([-torch.inf, -80.0, -3.0, 0.0, 0.1, 3.0, 80.0]), min_size=1, max_size=64),
    st.none() | st.integers(2, 5),
    st.sampled_from([None, 0.3, 0.9]),
)
def test_tokens_without_probability_are_never_chosen(
    values: list[float], top_k: int | None, top_p: float | None
) -> None:
    logits = torch.tensor(values)
    assume(bool(logits.isfinite().any()))
    tokens = drawn(logits, 200, top_k, top_p)
    assert logits[tokens].isfinite().all()
    if top_k is not None and top_k < len(logits):
        assert (logits[tokens] >= logits.topk(top_k).values.min()).all()


# How firmly


@given(
    st.integers(0, 10_000),
    st.sampled_from([(None, None), (8, None), (None, 0.8), (8, 0.8), (1, None)]),
)
def test_errors_below_the_rounding_do_not_change_what_is_certain(
    seed: int, limits: tuple[int | None, float | None]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (16, 3, 40)
    logits = torch.randn(shape, generator=generator)
    logits[:8] = (logits[:8] / ROUNDING / 4).round() * ROUNDING / 4  # some as close as it gets
    logits[:4] *= 1e-3
    noise = noise_of(16, seed)
    choice = choose(logits, noise, 5, *limits)
    errors = torch.rand(shape, generator=generator).sub_(0.5).mul_(0.98 * ROUNDING)
    again = choose(logits + errors, noise, 5, *limits)
    same = (choice.tokens == again.tokens).all(1)
    assert same[choice.certain].all()


def test_what_hangs_on_a_rounding_is_said_to_be_uncertain() -> None:
    noise = noise_of(2)
    gumbel = noise.gumbel(torch.arange(3).expand(2, 1, 3), 0)[0, 0]
    tie = (-gumbel).clone()
    tie[2] -= 5  # the first two are equal once the noise is added
    clear = tie.clone()
    clear[0] += 2.1 * ROUNDING
    logits = torch.stack([tie, clear])[:, None]
    same_noise = TokenNoise(noise.keys_B[:1].expand(2))
    assert choose(logits, same_noise, 0, None, None).certain.tolist() == [False, True]


@pytest.mark.parametrize(
    ("limits", "logits", "possible"),
    [
        ((2, None), [3.0, 1.0, 1.0 + ROUNDING / 4, 0.5], 3),  # which of two is the second
        ((None, 0.5), [math.log(p) for p in (0.5 + ROUNDING / 4, 0.3, 0.2)], 2),  # is the first alone enough
    ],
)
def test_a_border_within_rounding_matters_only_where_it_decides(
    limits: tuple[int | None, float | None], logits: list[float], possible: int
) -> None:
    count = 400
    noise = TokenNoise(torch.arange(count) * 7919)
    values = torch.tensor(logits)
    choice = choose(values.expand(count, 1, -1), noise, 0, *limits)
    gumbel = noise.gumbel(torch.arange(possible).expand(count, 1, -1), 0)[:, 0]
    at_border = (values[:possible] + gumbel).argmax(1) != 0
    assert at_border.any()
    assert not choice.certain[at_border].any()
    assert choice.certain[~at_border].float().mean() > 0.99


def test_few_images_of_the_published_size_are_uncertain() -> None:
    logits = torch.randn(40, 68, 4096, generator=torch.Generator().manual_seed(0)) * 2
    share = 1 - float(choose(logits, noise_of(40), 0, 900, 0.96).certain.float().mean())
    assert share <= 0.1  # a gap is exponential with mean 1: 68 positions, 1e-4 each, and the borders


# Noise


def splitmix64(key: int, count: int) -> int:
    """Output number `count` of the generator seeded with `key`, in Python's integers."""
    word = 2**64 - 1
    z = (key + (count + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & word
    return z ^ z >> 31


def test_the_generator_is_splitmix64() -> None:
    # The first outputs for seed 1234567, as published with the reference implementations.
    assert [splitmix64(1234567, n) for n in range(2)] == [6457827717110365317, 3203168211198807973]


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**20),
    st.integers(0, 2**20),
)
def test_noise_is_that_of_its_definition(key: int, position: int, token: int) -> None:
    noise = TokenNoise(torch.tensor([key])).gumbel(torch.tensor([[[token]]]), position)
    uniform = ((splitmix64(key % 2**64, (position << 32) + token) >> 40) + 0.5) / 2**24
    torch.testing.assert_close(noise.double().item(), -np.log(-np.log(uniform)), rtol=1e-4, atol=1e-5)


def test_noise_has_the_gumbel_distribution() -> None:
    noise = noise_of(20, seed=3).gumbel(torch.arange(1000).expand(20, 10, 1000), 0).double().flatten()
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    steps = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert float((uniform - steps).abs().max()) < 1.95 / len(uniform) ** 0.5  # Kolmogorov-Smirnov, 99.9 %


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 5))
def test_noise_of_an_image_can_be_had_without_that_of_others(seed: int, index: int, count: int) -> None:
    tokens = torch.arange(30).expand(count, 2, 30)
    noise = noise_of(count, seed, index).gumbel(tokens, 4)
    alone = noise_of(1, seed, index + count - 1)
    assert noise[-1:].equal(alone.gumbel(tokens[:1], 4))
    assert noise[-1:, 1:].equal(alone.gumbel(tokens[:1, :1], 5))
    keys = torch.cat([noise_of(count, seed, index).keys_B, noise_of(count, seed + 1, index).keys_B])
    assert len(keys.unique()) == 2 * count


# Mixtures


def soft_codes(logits: np.ndarray, gumbel: np.ndarray, codes: np.ndarray, k: int, num_scales: int) -> Any:
    """What the published program computes for one position, in NumPy and float64."""
    ratio = k / (num_scales - 1)
    temperature = max(0.27 * (1 - ratio * 0.95), 0.005)
    scores = (logits * (1 + ratio) + gumbel) / temperature
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ codes


@given(
    st.integers(0, 4),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.05, 1.0),
    st.integers(0, 2**31),
)
def test_a_mixture_is_the_published_soft_code_of_what_may_be_chosen(
    scale: int, top_k: int | None, top_p: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, codes = torch.randn(2, 3, 10, generator=generator), torch.randn(10, 4, generator=generator)
    noise = noise_of(2, seed)
    gumbel = noise.gumbel(torch.arange(10).expand(2, 3, -1), 5)
    mixture = mix(logits, noise, 5, top_k, top_p, progress=scale / 4)
    for image in range(2):
        for position in range(3):
            own = logits[image, position]
            kept, _ = kept_tokens(own, top_k, top_p)
            masked = np.where(kept, own.double().numpy(), -np.inf)
            own_noise, table = gumbel[image, position].double().numpy(), codes.double().numpy()
            expected = soft_codes(masked, own_noise, table, scale, 5)
            weights = mixture.weights_BlV[image, position]
            np.testing.assert_allclose((weights @ codes).numpy(), expected, atol=1e-4)
            assert mixture.tokens[image, position] == weights.argmax()
            assert kept[mixture.tokens[image, position]]
    torch.testing.assert_close(mixture.weights_BlV.sum(-1), torch.ones(2, 3))


def test_a_mixture_of_one_candidate_is_that_code() -> None:
    logits = torch.randn(2, 3, 10)
    mixture = mix(logits, noise_of(2), 0, 1, None, progress=0.5)
    assert mixture.tokens.equal(logits.argmax(-1))
    assert mixture.weights_BlV.equal(nn.functional.one_hot(mixture.tokens, 10).float())


def test_mixtures_harden_towards_the_last_scale() -> None:
    logits = torch.randn(1, 200, 50)
    most = [
        float(mix(logits, noise_of(), 0, None, None, progress=r).weights_BlV.amax(-1).mean())
        for r in (0.0, 0.5, 1.0)
    ]
    assert most == sorted(most)
    assert most[-1] > 0.95

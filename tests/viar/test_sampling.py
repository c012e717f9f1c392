"""Generation: published numbers, choice of tokens, guidance, and what an image depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_reference import (
    golden_config,
    golden_labels,
    golden_tensors,
    golden_tokenizer,
    golden_transformer,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer
from torch import Tensor

from deqlib import Anderson
from viar import Adaptive, NextScaleTransformer, Tokenizer, generate, sample_tokens
from viar.sampling import choose, guidance_ramp, guide, uniform_noise
from viar.scales import scale_slices

SCHEDULES = golden_config()["gen_iterations"]
LAST_NOISE = 1 - 2**-24  # the largest float32 below 1

# Published numbers


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_tensors()


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return golden_tokenizer()


@pytest.fixture(scope="module")
def published_models() -> dict[str, NextScaleTransformer]:
    return {name: golden_transformer(name) for name in ("var", "viar")}


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("var.generate", None),
        *((f"viar.generate.{first}.{last}", (first, last)) for first, last in SCHEDULES),
    ],
)
def test_generation_matches_the_published_program(
    golden: dict[str, Tensor],
    published: Tokenizer,
    published_models: dict[str, NextScaleTransformer],
    name: str,
    iterations: tuple[int, int] | None,
) -> None:
    settings = {"iterations": iterations, "cfg": golden_config()["cfg"], "top_k": 1}
    if iterations is not None:
        settings["cache"] = "iterate"
    model = published_models[name.split(".")[0]]
    sample = sample_tokens(model, published, golden_labels(), **settings)
    assert torch.cat(sample.tokens, 1).equal(golden[f"{name}.tokens"].long())
    images = generate(model, published, golden_labels(), **settings)
    torch.testing.assert_close(images, golden[f"{name}.image"], atol=2e-4, rtol=0)


# Choice of a token


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


def chosen(logits: Tensor, noise: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Tokens of logits (V,) at every noise (n,)."""
    return choose(logits.expand(1, len(noise), -1), noise[None], top_k, top_p)[0]


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
    noise = (torch.arange(4096) + 0.5) / 4096
    counts = chosen(logits, noise, top_k, top_p).bincount(minlength=len(values))
    assert not counts[~kept].any()
    torch.testing.assert_close(counts / 4096, probability.float(), atol=1.5 / 4096, rtol=0)
    assert (counts[kept & (probability > 2 / 4096)] > 0).all()


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
        (2, None, 4),  # ties with the last token kept stay
        (99, None, 4),
        (4, None, 4),
    ],
)
def test_equal_logits_show_the_boundaries_of_top_k_and_top_p(
    top_k: int | None, top_p: float | None, expected: int
) -> None:
    noise = (torch.arange(64) + 0.5) / 64
    assert len(chosen(torch.zeros(4), noise, top_k, top_p).unique()) == expected


@pytest.mark.parametrize("top_p", [1e-3, 1e-9, 1e-30])
def test_the_most_likely_token_stays_however_small_top_p_is(top_p: float) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert chosen(logits, torch.tensor([0.0, 0.5, LAST_NOISE]), top_p=top_p).unique() == logits.argmax()


def test_top_p_counts_the_probability_left_by_top_k() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    noise = (torch.arange(64) + 0.5) / 64
    # of the two that top-k keeps the first has 4/7: above 0.5, so it alone stays; alone it has 0.4
    assert chosen(logits, noise, top_k=2, top_p=0.5).unique().tolist() == [0]
    assert chosen(logits, noise, top_p=0.5).unique().tolist() == [0, 1]


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_top_k_of_one_is_argmax_whatever_the_noise(values: list[float], top_p: int) -> None:
    logits = torch.tensor(values)
    tokens = chosen(logits, torch.tensor([0.0, 0.5, LAST_NOISE]), top_k=1, top_p=top_p / 40)
    assert (tokens == logits.argmax()).all()


@given(
    st.lists(st.sampled_from([-torch.inf, -80.0, -3.0, 0.0, 0.1, 3.0, 80.0]), min_size=1, max_size=64),
    st.none() | st.integers(2, 5),
    st.sampled_from([None, 0.3, 0.9]),
)
def test_the_most_extreme_noise_never_picks_a_token_without_probability(
    values: list[float], top_k: int | None, top_p: float | None
) -> None:
    logits = torch.tensor(values)
    assume(bool(logits.isfinite().any()))
    noise = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-23, LAST_NOISE])
    tokens = chosen(logits, noise, top_k, top_p)
    assert (logits.softmax(0)[tokens] > 0).all()
    if top_k is not None and top_k < len(logits):
        assert (logits[tokens] >= logits.topk(top_k).values.min()).all()


@pytest.mark.parametrize("size", [4096, 10_000])
def test_rounding_of_a_large_codebook_does_not_reach_past_its_last_likely_token(size: int) -> None:
    for seed in range(20):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
        logits[-100:] = -torch.inf
        logits[:100] = -torch.inf
        logits[-101] = 3.0  # likely enough to be seen at the end of the sum
        tokens = chosen(logits, torch.tensor([0.0, LAST_NOISE, 1.0]))  # products are rounded up to 1
        assert tokens.tolist() == [100, size - 101, size - 101]


def test_sampled_frequencies_match_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    noise = uniform_noise(100, 100, seed=7, first_index=0).flatten()
    counts = chosen(logits, noise).bincount(minlength=5)
    expected = logits.softmax(0) * len(noise)
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 18.5  # 99.9 % of the chi-square distribution with 4 degrees of freedom


# Guidance


def test_guidance_moves_away_from_the_logits_without_class() -> None:
    cond, null = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    both = torch.cat([cond, null])
    torch.testing.assert_close(guide(both, 0.75), 1.75 * cond - 0.75 * null)
    assert guide(both, 0.0).equal(cond)


def test_guidance_rises_linearly_over_the_scales() -> None:
    assert [guidance_ramp(k, 5) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert guidance_ramp(0, 1) == 1


# The sampler as a whole


def teacher_forced_tokens(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor,
    tokens: list[Tensor],
    *,
    cfg: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    first_index: int,
) -> list[Tensor]:
    """What each scale's tokens ought to be, given those before, from joint forward passes."""
    inputs = tokenizer.next_scale_inputs(tokens)
    noise = uniform_noise(len(labels), inputs.shape[1] + 1, seed, first_index)
    with torch.no_grad():
        cond = model(labels, inputs)
        null = model(torch.full_like(labels, model.null_class), inputs)
    expected = []
    for scale, where in enumerate(scale_slices(SIDES)):
        strength = cfg * scale / (len(SIDES) - 1)
        logits = (1 + strength) * cond[:, where] - strength * null[:, where]
        expected.append(choose(logits, noise[:, where], top_k, top_p))
    return expected


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_every_token_is_the_choice_a_teacher_forced_pass_makes(kind: str, cfg: float) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    labels = torch.tensor([0, 1, 2, 3])
    cache = "iterate" if kind == "implicit" else "equilibrium"
    settings = {"cfg": cfg, "top_k": 12, "top_p": 0.9, "seed": 5, "first_index": 2}
    sample = sample_tokens(model, tokenizer, labels, cache=cache, **settings)
    expected = teacher_forced_tokens(model, tokenizer, labels, sample.tokens, **settings)
    assert len({int(t) for tokens in expected for t in tokens.flatten()}) > 5
    for actual, wanted in zip(sample.tokens, expected, strict=True):
        assert actual.equal(wanted)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_sample_holds_tokens_of_every_scale_and_their_sum(kind: str) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    sample = sample_tokens(model, tokenizer, [0, 1])
    assert [tuple(t.shape) for t in sample.tokens] == [(2, side * side) for side in SIDES]
    torch.testing.assert_close(sample.f_hat, tokenizer.quantizer.decode_tokens(sample.tokens))
    images = generate(model, tokenizer, [0, 1])
    assert images.shape == (2, 3, 6, 6)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, (tokenizer.decode(sample.tokens) + 1) / 2)
    assert not images.requires_grad


def test_without_guidance_the_null_class_plays_no_part() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    plain = sample_tokens(model, tokenizer, [0, 1, 2], cfg=0.0)
    guided = sample_tokens(model, tokenizer, [0, 1, 2], cfg=3.0)
    with torch.no_grad():
        model.class_embed.weight[model.null_class] += 10
    again = sample_tokens(model, tokenizer, [0, 1, 2], cfg=0.0)
    assert torch.cat(plain.tokens, 1).equal(torch.cat(again.tokens, 1))
    assert not torch.cat(plain.tokens, 1).equal(torch.cat(guided.tokens, 1))
    assert guided.cache_bytes == 2 * plain.cache_bytes  # both halves of the doubled batch


def test_guidance_towards_no_class_changes_nothing() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    labels = [model.null_class] * 3
    plain, guided = (sample_tokens(model, tokenizer, labels, cfg=cfg, seed=1) for cfg in (0.0, 5.0))
    assert torch.cat(plain.tokens, 1).equal(torch.cat(guided.tokens, 1))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("explicit", {}),
        ("implicit", {"iterations": (4, 2), "cache": "iterate"}),
        ("implicit", {"iterations": (2, 4)}),
        ("implicit", {"iterations": Adaptive(rtol=1e-2, max_steps=8)}),
        ("implicit", {"iterations": Adaptive(rtol=1e-2, max_steps=8, solver=Anderson(memory=2))}),
    ],
)
def test_an_image_depends_on_its_seed_index_and_label_alone(kind: str, settings: dict[str, Any]) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])

    def tokens_of(start: int, stop: int) -> Tensor:
        sample = sample_tokens(model, tokenizer, labels[start:stop], seed=11, first_index=start, **settings)
        return torch.cat(sample.tokens, 1)

    together = tokens_of(0, 7)
    assert torch.cat([tokens_of(4, 7), tokens_of(3, 4), tokens_of(0, 3)])[[4, 5, 6, 3, 0, 1, 2]].equal(
        together
    )
    assert torch.cat([tokens_of(i, i + 1) for i in range(7)]).equal(together)
    other = sample_tokens(model, tokenizer, labels, seed=12, **settings)
    assert (torch.cat(other.tokens, 1) != together).any(1).all()
    assert len(together[[0, 4]].unique(dim=0)) == 2  # same label, other index


def test_sampling_neither_reads_nor_moves_the_global_generator() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, [0, 1])
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert generate(model, tokenizer, [0, 1]).equal(first)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 5))
def test_noise_of_an_image_can_be_had_without_that_of_others(seed: int, index: int, count: int) -> None:
    noise = uniform_noise(count, 30, seed, index)
    assert noise.dtype == torch.float32
    assert 0 <= noise.min() <= noise.max() < 1
    assert noise[-1:].equal(uniform_noise(1, 30, seed, index + count - 1))
    assert len(torch.cat([noise, uniform_noise(count, 30, seed + 1, index)]).unique(dim=0)) == 2 * count


def test_embeddings_can_be_replaced_scale_by_scale() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    wanted = [torch.full((1, side * side), 3) for side in SIDES]
    seen = []

    def replace(scale: int, sampled: Tensor) -> Tensor:
        seen.append((scale, tuple(sampled.shape)))
        return tokenizer.quantizer.embed(wanted[scale])

    sample = sample_tokens(model, tokenizer, [0], replace=replace)
    assert seen == [(0, (1, 4, 1, 1)), (1, (1, 4, 2, 2)), (2, (1, 4, 3, 3))]
    torch.testing.assert_close(sample.f_hat, tokenizer.quantizer.decode_tokens(wanted))
    # the tokens reported are those sampled, and later ones follow from what replaced the earlier
    settings = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seed": 0, "first_index": 0}
    iterate = sample_tokens(model, tokenizer, [0], replace=replace, cache="iterate")
    expected = teacher_forced_tokens(model, tokenizer, torch.tensor([0]), wanted, **settings)
    assert torch.cat(iterate.tokens, 1).equal(torch.cat(expected, 1))


def test_iterations_default_to_those_of_the_config() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    default, explicit, other = (
        generate(model, tokenizer, [0, 1], iterations=iterations) for iterations in (None, 3, 1)
    )
    assert default.equal(explicit)
    assert not default.equal(other)


def test_the_equilibrium_cache_keeps_what_the_explicit_trunk_of_as_many_blocks_keeps() -> None:
    tokenizer = tiny_tokenizer()
    implicit, explicit = tiny_transformer("implicit"), tiny_transformer("explicit")
    expected = 2 * 2 * 3 * 14 * 16 * 4  # keys and values, guidance, blocks, tokens, width, float32
    for count in (1, 9):
        assert sample_tokens(implicit, tokenizer, [0], iterations=count).cache_bytes == expected
    assert sample_tokens(explicit, tokenizer, [0]).cache_bytes == expected


# Errors


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected evaluation mode.*model\.eval\(\)"):
        generate(tiny_transformer().train(), tiny_tokenizer(), [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": (1, 3)}, r"its sides is \(1, 3\), the model's is \(1, 2, 3\)"),
        ({"codebook_size": 8}, "its codebook_size is 8, the model's is 16"),
        ({"code_channels": 6}, "its code_channels is 6, the model's is 4"),
    ],
)
def test_a_tokenizer_of_other_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer: {message}"):
        generate(tiny_transformer(), tiny_tokenizer(**changes), [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg": -1.0}, "cfg: expected a number of at least 0, got -1.0"),
        ({"cfg": float("nan")}, "cfg: .* got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, or None"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], or None"),
        ({"top_p": 1.5}, "top_p: .* got 1.5"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"first_index": -1}, "first_index: expected an integer from 0"),
        ({"seed": 2**63}, "seed: expected an integer"),
        ({"cache": "none"}, "cache: expected one of"),
        ({"iterations": 0}, "iterations: every scale needs at least 1"),
        ({"iterations": [1, 2]}, r"iterations: expected one count a scale \(3\)"),
        ({"iterations": (1, 3), "cache": "iterate"}, "iterations: the iterate cache needs"),
        ({"iterations": Adaptive(), "cache": "iterate"}, "cache: 'iterate' needs fixed counts"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_transformer(), tiny_tokenizer(), [0], **settings)


@pytest.mark.parametrize("labels", [[4], [-1], [0.5], [[0, 1]], []])
def test_labels_that_are_no_classes_are_refused(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="labels: expected"):
        generate(tiny_transformer(), tiny_tokenizer(), labels)


def test_an_explicit_trunk_takes_neither_iterations_nor_their_cache() -> None:
    model, tokenizer = tiny_transformer("explicit"), tiny_tokenizer()
    with pytest.raises(ValueError, match="iterations: an explicit trunk has none"):
        generate(model, tokenizer, [0], iterations=3)
    with pytest.raises(ValueError, match="'iterate' needs an implicit trunk"):
        generate(model, tokenizer, [0], cache="iterate")

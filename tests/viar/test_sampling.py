"""Generation: published numbers, choice of tokens, guidance, and what an image depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_reference import (
    golden_config,
    golden_labels,
    golden_tensors,
    golden_tokenizer,
    golden_transformer,
)
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer
from torch import Tensor

import viar.generation.sampling
from deqlib import Anderson
from viar import (
    Adaptive,
    NextScaleTransformer,
    Sampling,
    Tokenizer,
    edit,
    generate,
    generate_series,
    sample_tokens,
)
from viar.generation.choice import TokenNoise, choose
from viar.generation.guidance import Guidance, guidance_ramp
from viar.model.scales import resize_tokens, scale_slices

SCHEDULES = golden_config()["gen_iterations"]

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
    sample = sample_tokens(model, published, golden_labels(), Sampling(**settings))
    assert torch.cat(sample.tokens, 1).equal(golden[f"{name}.tokens"].long())
    images = generate(model, published, golden_labels(), **settings)
    torch.testing.assert_close(images, golden[f"{name}.image"], atol=2e-4, rtol=0)


# Guidance


def test_guidance_moves_away_from_the_logits_without_class() -> None:
    cond, null = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    guidance, both = Guidance(1.5, (1, 2, 3), 2), torch.cat([cond, null])
    torch.testing.assert_close(guidance.guide(1, both), 1.75 * cond - 0.75 * null)
    assert guidance.guide(0, both).equal(cond)
    assert Guidance(0.0, (1, 2, 3), 2).guide(1, cond).equal(cond)


def test_guidance_rises_linearly_over_the_scales() -> None:
    assert [guidance_ramp(k, 5) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert guidance_ramp(0, 1) == 1


# The sampler as a whole


def teacher_forced_tokens(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    labels: Tensor,
    tokens: list[Tensor],
    sampling: Sampling,
    *,
    first_index: int,
) -> list[Tensor]:
    """What each scale's tokens ought to be, given those before, from joint forward passes."""
    inputs = tokenizer.next_scale_inputs(tokens)
    noise = TokenNoise.of_images(len(labels), sampling.seed, first_index, labels.device)
    with torch.no_grad():
        cond = model(labels, inputs)
        null = model(torch.full_like(labels, model.null_class), inputs)
    expected = []
    for scale, where in enumerate(scale_slices(SIDES)):
        strength = sampling.cfg * scale / (len(SIDES) - 1)
        logits = (1 + strength) * cond[:, where] - strength * null[:, where]
        expected.append(choose(logits, noise, where.start, sampling.top_k, sampling.top_p).tokens)
    return expected


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_every_token_is_the_choice_a_teacher_forced_pass_makes(kind: str, cfg: float) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    labels = torch.tensor([0, 1, 2, 3])
    cache = "iterate" if kind == "implicit" else "equilibrium"
    sampling = Sampling(cfg=cfg, top_k=12, top_p=0.9, seed=5, cache=cache)
    sample = sample_tokens(model, tokenizer, labels, sampling, first_index=2)
    expected = teacher_forced_tokens(model, tokenizer, labels, sample.tokens, sampling, first_index=2)
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
    plain = sample_tokens(model, tokenizer, [0, 1, 2], Sampling(cfg=0.0))
    guided = sample_tokens(model, tokenizer, [0, 1, 2], Sampling(cfg=3.0))
    with torch.no_grad():
        model.class_embed.weight[model.null_class] += 10
    again = sample_tokens(model, tokenizer, [0, 1, 2], Sampling(cfg=0.0))
    assert torch.cat(plain.tokens, 1).equal(torch.cat(again.tokens, 1))
    assert not torch.cat(plain.tokens, 1).equal(torch.cat(guided.tokens, 1))
    assert guided.cache_bytes == 2 * plain.cache_bytes  # both halves of the doubled batch


def test_guidance_towards_no_class_changes_nothing() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    labels = [model.null_class] * 3
    plain, guided = (sample_tokens(model, tokenizer, labels, Sampling(cfg=cfg, seed=1)) for cfg in (0.0, 5.0))
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

    sampling = Sampling(seed=11, **settings)

    def tokens_of(start: int, stop: int) -> Tensor:
        sample = sample_tokens(model, tokenizer, labels[start:stop], sampling, first_index=start)
        return torch.cat(sample.tokens, 1)

    together = tokens_of(0, 7)
    assert torch.cat([tokens_of(4, 7), tokens_of(3, 4), tokens_of(0, 3)])[[4, 5, 6, 3, 0, 1, 2]].equal(
        together
    )
    assert torch.cat([tokens_of(i, i + 1) for i in range(7)]).equal(together)
    other = sample_tokens(model, tokenizer, labels, Sampling(seed=12, **settings))
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
    iterate = sample_tokens(model, tokenizer, [0], Sampling(cache="iterate"), replace=replace)
    expected = teacher_forced_tokens(model, tokenizer, torch.tensor([0]), wanted, Sampling(), first_index=0)
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
        assert sample_tokens(implicit, tokenizer, [0], Sampling(iterations=count)).cache_bytes == expected
    assert sample_tokens(explicit, tokenizer, [0]).cache_bytes == expected


# Errors


# Report, warm start, reuse of guidance


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_a_report_tells_what_every_scale_took(kind: str) -> None:
    model, tokenizer = tiny_transformer(kind), tiny_tokenizer()
    settings = {} if kind == "explicit" else {"iterations": (4, 2)}
    images, report = generate(model, tokenizer, [0, 1], return_report=True, **settings)
    assert images.equal(generate(model, tokenizer, [0, 1], **settings))
    assert [scale.side for scale in report.scales] == list(SIDES)
    evaluations = [scale.evaluations for scale in report.scales]
    assert evaluations == ([4, 3, 2] if kind == "implicit" else [None] * 3)
    assert report.evaluations == (9 if kind == "implicit" else None)
    assert all((scale.residual is not None) == (kind == "implicit") for scale in report.scales)
    held, sample = (
        [scale.cache_bytes for scale in report.scales],
        sample_tokens(model, tokenizer, [0, 1], Sampling(**settings)),
    )
    assert held[-1] == report.cache_bytes == sample.cache_bytes
    assert [14 * n for n in held] == [n * report.cache_bytes for n in (1, 5, 14)]  # as tokens so far
    assert 0 < report.decode_seconds < report.seconds
    lines = str(report).splitlines()
    assert len(lines) == 1 + 3 + 2
    assert lines[3].split()[:4] == ["3", "x", "3", "2.0" if kind == "implicit" else "-"]


def test_adaptive_reports_the_evaluations_it_used() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    loose, tight = (
        generate(model, tokenizer, [0, 1], iterations=Adaptive(rtol=rtol, max_steps=60), return_report=True)[
            1
        ]
        for rtol in (1e-1, 1e-4)
    )
    assert loose.evaluations < tight.evaluations
    assert max(scale.residual for scale in tight.scales) < 1e-4


def test_reused_guidance_is_that_of_the_scale_before() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    labels = torch.tensor([0, 1, 2])
    settings = {"cfg": 3.0, "top_k": 1}
    full = sample_tokens(model, tokenizer, labels, Sampling(**settings))
    reused = sample_tokens(model, tokenizer, labels, Sampling(guidance_reuse=1, **settings))
    for before, after in zip(full.tokens[:-1], reused.tokens[:-1], strict=True):
        assert before.equal(after)
    # The last scale by hand: the direction of the second, enlarged, on top of the third with class alone.
    inputs = tokenizer.next_scale_inputs(full.tokens)
    where = scale_slices(SIDES)

    def hidden(classes: Tensor, scale: int) -> Tensor:
        embedding, cond = model.condition(classes)
        memory = model.trunk.new_cache("equilibrium", [3] * 3)
        for k in range(scale + 1):
            given = None
            if k:  # inputs begin at the second scale, one token later
                given = inputs[:, where[k].start - 1 : where[k].stop - 1].mT.unflatten(2, (k + 1, k + 1))
            x = model.embed_scale(k, embedding, given)
            x = model.trunk(x, model.trunk.modulate(cond), cache=memory, iterations=3).x_BLC
        return model.head_input(x, model.modulate_head(embedding))

    with torch.no_grad():
        null = torch.full_like(labels, model.null_class)
        direction = hidden(labels, 1) - hidden(null, 1)
        direction = resize_tokens(direction, 3)
        expected = model.head(hidden(labels, 2) + 3.0 * direction).argmax(-1)
    assert reused.tokens[-1].equal(expected)
    assert not reused.tokens[-1].equal(full.tokens[-1])


def test_reused_guidance_computes_no_null_class_on_those_scales() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    rows = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sample_tokens(model, tokenizer, [0, 1], Sampling(guidance_reuse=2))
    assert rows == [4, 2, 2]


def test_guidance_without_a_class_may_be_reused_without_a_difference() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    labels = [model.null_class] * 3
    plain, reused = (sample_tokens(model, tokenizer, labels, Sampling(guidance_reuse=n)) for n in (0, 2))
    assert torch.cat(plain.tokens, 1).equal(torch.cat(reused.tokens, 1))


def test_a_warm_start_reaches_the_sampler() -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    cold, warm = (
        sample_tokens(model, tokenizer, [0, 1, 2], Sampling(warm_start=start), measure=True)
        for start in (False, True)
    )
    assert cold.scales[0].residual == warm.scales[0].residual
    assert cold.scales[1].residual != warm.scales[1].residual


def test_images_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_transformer(), tiny_tokenizer()
    together = generate(model, tokenizer, [0, 1, 2, 0, 1])
    batches = []
    tokenizer.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    monkeypatch.setitem(viar.generation.sampling.DECODED_PIXELS, "cpu", 2 * 36)  # two pictures of 6 x 6
    torch.testing.assert_close(generate(model, tokenizer, [0, 1, 2, 0, 1]), together)
    assert batches == [2, 2, 1]


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
        ({"cfg": -1.0}, "cfg: expected a number from 0 to 1,000,000, got -1.0"),
        ({"cfg": float("nan")}, "cfg: .* got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, or None"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], or None"),
        ({"top_p": 1.5}, "top_p: .* got 1.5"),
        ({"guidance_reuse": 3}, "guidance_reuse: expected 0 to 2 of the 3 scales"),
        ({"guidance_reuse": -1}, "guidance_reuse: "),
        ({"guidance_reuse": 1, "cfg": 0.0}, "guidance_reuse: .* got 1 with cfg=0.0"),
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


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": "3"},
        {"iterations": 2.5},
        {"iterations": True},
        {"iterations": [1, 2.0]},
        {"cfg": "1"},
        {"cfg": None},
        {"cfg": True},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": "0.9"},
        {"seed": 0.5},
        {"seed": True},
        {"guidance_reuse": 1.5},
        {"warm_start": "no"},
    ],
)
def test_settings_of_another_kind_are_named_when_they_are_made(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(settings))}: expected"):
        Sampling(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"iterations": 0}, {"iterations": []}, {"iterations": (3, 0)}, {"cfg": float("inf")}, {"cache": "x"}],
)
def test_settings_out_of_range_are_named_when_they_are_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: "):
        Sampling(**settings)


def test_numbers_of_numpy_become_pythons_and_a_list_is_copied() -> None:
    counts = [3, 2, 1]
    sampling = Sampling(
        seed=np.int64(3),
        cfg=np.float32(1.5),
        top_k=np.int32(4),
        guidance_reuse=np.int64(1),
        iterations=counts,
    )
    counts.append(9)
    assert sampling == Sampling(seed=3, cfg=1.5, top_k=4, guidance_reuse=1, iterations=[3, 2, 1])
    assert {type(value) for value in vars(sampling).values()} == {int, float, list, str, bool}


@pytest.mark.parametrize("sampling", [{}, 0, {"cfg": 1.0}])
def test_what_is_no_sampling_is_refused(sampling: Any) -> None:
    with pytest.raises(TypeError, match=r"sampling: expected a viar\.Sampling or None, got"):
        sample_tokens(tiny_transformer(), tiny_tokenizer(), [0], sampling)


@pytest.mark.parametrize("labels", [[4], [-1], [0.5], [[0, 1]], []])
def test_labels_that_are_no_classes_are_refused(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="labels: expected"):
        generate(tiny_transformer(), tiny_tokenizer(), labels)


@pytest.mark.parametrize("labels", [None, "ab", ["a"], [2**70], [None], object()])
def test_what_no_tensor_of_labels_can_be_made_of_is_named(labels: Any, tmp_path: Path) -> None:
    pair, picture = (tiny_transformer(), tiny_tokenizer()), torch.zeros(1, 3, 6, 6)
    calls: list[Callable[[], object]] = [
        lambda: generate(*pair, labels),
        lambda: edit(*pair, picture, torch.eye(6), labels),
    ]
    if labels is not None:  # of a series: all classes
        calls.append(lambda: generate_series(*pair, tmp_path / "series", 2, labels=labels))
    for call in calls:
        with pytest.raises(TypeError, match="labels: expected integers"):
            call()


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_type_mean_the_same(dtype: torch.dtype) -> None:
    model, tokenizer = tiny_transformer(num_classes=200, label_dropout=0.5), tiny_tokenizer()
    labels, inputs = torch.tensor([0, 3, 100]), torch.zeros(3, 13, 4)
    narrow = labels.to(dtype)
    assert generate(model, tokenizer, narrow).equal(generate(model, tokenizer, labels))
    outputs = []
    for given in (labels, narrow):
        torch.manual_seed(0)
        outputs.append(model.train()(given, inputs))
        model.eval()
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_the_default_device_plays_no_part(kind: str, tmp_path: Path) -> None:
    pair, picture = (tiny_transformer(kind), tiny_tokenizer()), torch.full((2, 3, 6, 6), 0.5)
    calls: list[Callable[[], Tensor]] = [
        lambda: generate(*pair, [0, 2]),
        lambda: generate(*pair, [0, 2], more_smooth=True, return_report=True)[0],
        lambda: generate(*pair, [0, 2], top_k=None, top_p=None, cfg=0),
        lambda: edit(*pair, picture, torch.eye(6, device="cpu"), [0, 2]),
        lambda: edit(*pair, picture, torch.eye(6, device="cpu"), [0, 2], keep="codes"),
    ]
    expected = [call() for call in calls]
    with torch.device("meta"):  # nothing has numbers there
        assert all(call().equal(before) for call, before in zip(calls, expected, strict=True))
        assert generate_series(*pair, tmp_path, 3, batch_size=2).made == 3
        with pytest.raises(ValueError, match="labels: expected classes"):
            generate(*pair, [9])


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_the_head_computes_in_float32_under_autocast(
    kind: str, cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, found = (tiny_transformer(kind), tiny_tokenizer()), []
    original = NextScaleTransformer.classify

    def seen(self: NextScaleTransformer, hidden_BLC: Tensor) -> Tensor:
        logits = original(self, hidden_BLC)
        found.append((hidden_BLC, logits))
        return logits

    monkeypatch.setattr(NextScaleTransformer, "classify", seen)
    for settings in ({}, {"more_smooth": True}):
        with torch.autocast("cpu", torch.bfloat16):
            images = generate(*pair, [0, 2], cfg=cfg, **settings)
        assert images.shape == (2, 3, 6, 6)
    assert len(found) == 6
    assert all(logits.equal(pair[0].head(hidden)) for hidden, logits in found)
    with torch.autocast("cpu", torch.bfloat16):
        modulation = pair[0].modulate_head(torch.ones(1, 16))
    assert modulation.equal(pair[0].modulate_head(torch.ones(1, 16)))


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_autocast_leaves_float64_alone(kind: str) -> None:
    pair = tiny_transformer(kind).double(), tiny_tokenizer()
    for sampling in (Sampling(), Sampling(more_smooth=True)):
        expected = sample_tokens(*pair, [0, 2], sampling).f_hat
        with torch.autocast("cpu", torch.bfloat16):
            assert sample_tokens(*pair, [0, 2], sampling).f_hat.equal(expected)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_no_images_at_all_are_made_by_every_way_in(kind: str) -> None:
    pair, none = (tiny_transformer(kind), tiny_tokenizer()), torch.zeros(0, dtype=torch.int64)
    images, report = generate(*pair, none, return_report=True)
    assert images.shape == (0, 3, 6, 6)
    assert report.evaluations is None
    assert [scale.residual for scale in report.scales] == [None] * 3
    assert str(report)
    for keep in ("features", "codes"):
        assert edit(*pair, images, torch.ones(6, 6), none, keep=keep).shape == (0, 3, 6, 6)


def test_an_explicit_trunk_takes_neither_iterations_nor_their_cache() -> None:
    model, tokenizer = tiny_transformer("explicit"), tiny_tokenizer()
    with pytest.raises(ValueError, match="iterations: an explicit trunk has none"):
        generate(model, tokenizer, [0], iterations=3)
    with pytest.raises(ValueError, match="'iterate' needs an implicit trunk"):
        generate(model, tokenizer, [0], cache="iterate")

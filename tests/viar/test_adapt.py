"""Starting from trained weights: the same model where nothing changes, and rows that move where it does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TOKENIZER, TRUNKS, tiny_config, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

from viar import ExplicitTrunkConfig, NextScaleTransformer, Tokenizer
from viar.training import adapt_tokenizer, adapt_transformer

KINDS = list(TRUNKS)
rising_sides = st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(
    lambda s: tuple(sorted(s))
)


def logits(model: NextScaleTransformer, labels: list[int], seed: int = 0) -> Tensor:
    tokens = model.pos_embed.shape[1] - model.pos_start.shape[1]
    inputs = uniform(len(labels), tokens, model.config.code_channels, seed=seed)
    with torch.no_grad():
        result: Tensor = model.eval()(torch.tensor(labels), inputs)
    return result


def tokens_before(sides: tuple[int, ...], scale: int) -> int:
    return sum(side * side for side in sides[:scale])


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_settings_it_is_the_same_model(kind: str) -> None:
    trained = tiny_transformer(kind, qk_norm=True, shared_modulation=True)
    model, changes = adapt_transformer(trained, dataclasses.replace(trained.config, label_dropout=0.5))
    assert changes == []
    assert logits(model, [0, 1, 3]).equal(logits(trained, [0, 1, 3]))
    assert model.config.label_dropout == 0.5
    with torch.no_grad():
        model.pos_embed.zero_()
    assert trained.pos_embed.abs().sum() > 0  # no memory is shared


@given(kind=st.sampled_from(KINDS), classes=st.integers(1, 9), seed=st.integers(0, 99))
def test_classes_that_are_kept_and_no_class_have_the_logits_they_had(
    kind: str, classes: int, seed: int
) -> None:
    trained = tiny_transformer(kind, seed=seed)
    torch.manual_seed(seed)
    model, changes = adapt_transformer(trained, dataclasses.replace(trained.config, num_classes=classes))
    kept = list(range(min(3, classes)))
    assert logits(model, [*kept, classes]).equal(logits(trained, [*kept, 3]))
    assert len(changes) == (classes != 3)
    torch.manual_seed(seed)
    fresh = NextScaleTransformer(model.config)
    assert model.class_embed.weight[3:classes].equal(fresh.class_embed.weight[3:classes])


def test_what_happens_to_classes_is_said_in_a_line() -> None:
    trained = tiny_transformer()
    (line,) = adapt_transformer(trained, dataclasses.replace(trained.config, num_classes=5))[1]
    assert line == ("class_embed.weight: 3 of 3 classes kept, 0 dropped, 2 new; row of no class: 3 to 5")


@given(old=rising_sides, new=rising_sides, seed=st.integers(0, 99))
def test_scales_of_the_same_side_keep_their_rows_and_others_are_as_drawn(
    old: tuple[int, ...], new: tuple[int, ...], seed: int
) -> None:
    trained = tiny_transformer("explicit", seed=seed, sides=old)
    torch.manual_seed(seed)
    model, changes = adapt_transformer(trained, dataclasses.replace(trained.config, sides=new))
    torch.manual_seed(seed)
    fresh = NextScaleTransformer(model.config)
    for scale, side in enumerate(new):
        place = slice(tokens_before(new, scale), tokens_before(new, scale + 1))
        level, positions = model.level_embed.weight[scale], model.pos_embed[:, place]
        if side in old:
            before = old.index(side)
            was = slice(tokens_before(old, before), tokens_before(old, before + 1))
            assert level.equal(trained.level_embed.weight[before])
            assert positions.equal(trained.pos_embed[:, was])
        else:
            assert level.equal(fresh.level_embed.weight[scale])
            assert positions.equal(fresh.pos_embed[:, place])
    assert model.pos_start.equal((trained if old[0] == new[0] else fresh).pos_start)
    assert model.head.weight.equal(trained.head.weight)
    assert len(changes) == (0 if old == new else 2 + (old[0] != new[0]))


@given(old=rising_sides, new=rising_sides, num_phi=st.sampled_from([0, 1, 2]))
def test_a_tokenizer_keeps_what_belongs_to_scales_of_the_same_side(
    old: tuple[int, ...], new: tuple[int, ...], num_phi: int
) -> None:
    trained = tiny_tokenizer(sides=old, num_phi=num_phi)
    trained.quantizer.usage.copy_(uniform(*trained.quantizer.usage.shape))
    torch.manual_seed(0)
    model, changes = adapt_tokenizer(trained, dataclasses.replace(trained.config, sides=new))
    torch.manual_seed(0)
    fresh = Tokenizer(model.config)
    for scale, side in enumerate(new):
        before = old.index(side) if side in old else None
        usage, phi = model.quantizer.usage[scale], model.quantizer.phi
        assert usage.equal(
            fresh.quantizer.usage[scale] if before is None else trained.quantizer.usage[before]
        )
        if num_phi == 0:
            source = fresh.quantizer.phi[scale] if before is None else trained.quantizer.phi[before]
            assert phi[scale].weight.equal(source.weight)
            assert phi[scale].bias.equal(source.bias)
    assert model.quantizer.codebook.weight.equal(trained.quantizer.codebook.weight)
    assert model.encoder.conv_in.weight.equal(trained.encoder.conv_in.weight)
    assert bool(changes) == (old != new)


def test_a_tokenizer_of_the_same_settings_gives_the_same_tokens() -> None:
    trained = tiny_tokenizer()
    model, changes = adapt_tokenizer(trained, dataclasses.replace(trained.config, dropout=0.2))
    images = uniform(4, 3, 6, 6) * 2 - 1
    assert changes == []
    for a, b in zip(model.eval().encode(images), trained.encode(images), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "width: 16 there, 32 asked for"),
        ({"depth": 4}, "depth: 3 there, 4 asked for"),
        ({"num_heads": 4}, "num_heads: 2 there, 4 asked for"),
        ({"qk_norm": False, "mlp_ratio": 2.0}, "mlp_ratio: 4.0 there, 2.0 asked for; qk_norm: True there"),
        ({"trunk": ExplicitTrunkConfig()}, "trunk.kind: implicit there, explicit asked for"),
        ({"codebook_size": 8}, "codebook_size: 16 there, 8 asked for"),
    ],
)
def test_settings_that_the_weights_decide_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    trained = tiny_transformer()
    with pytest.raises(ValueError, match=message):
        adapt_transformer(trained, tiny_config(**changes))


def test_a_tokenizer_of_another_codebook_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="codebook_size: 16 there, 8 asked for"):
        adapt_tokenizer(tiny_tokenizer(), dataclasses.replace(TOKENIZER, codebook_size=8))

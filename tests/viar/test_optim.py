"""Schedules and parameter groups of VAR's training."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_models import IMPLICIT, tiny_tokenizer, tiny_transformer

from viar.training.optim import build_optimizer, lr_factor, set_progress, weight_decay_at


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.005),  # warm-up over 2 % of the run, from 0.005
        (0.01, 0.5025),
        (0.02, 1.0),
        (0.02 + 0.98 * 0.05, 1.0),  # flat for 5 % of the rest
        (0.02 + 0.98 * 0.025, 1.0),
        (0.02 + 0.98 * 0.525, 0.505),  # half way down
        (1.0, 0.01),
    ],
)
def test_learning_rate_warms_up_stays_and_falls_linearly(progress: float, expected: float) -> None:
    assert lr_factor(progress) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_never_jumps() -> None:
    values = [lr_factor(step / 10_000) for step in range(10_001)]
    assert max(abs(a - b) for a, b in pairwise(values)) < 1 / 200 + 1e-4


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.05), (0.25, 0.065 - 0.015 * math.sqrt(0.5)), (0.5, 0.065), (1.0, 0.08)],
)
def test_weight_decay_follows_half_a_cosine(progress: float, expected: float) -> None:
    assert weight_decay_at(progress, 0.05, 0.08) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "shared"), [("explicit", False), ("implicit", False), ("implicit", True)])
def test_only_the_matrices_of_linear_layers_are_decayed(kind: str, shared: bool) -> None:
    model = tiny_transformer(kind, shared_modulation=shared)
    decayed, free = (
        {id(p) for p in group["params"]} for group in build_optimizer_of(model, 0.05).param_groups
    )
    spared = ("bias", "log_scale", "pos_start", "pos_embed", "modulation_offset")
    for name, parameter in model.named_parameters():
        is_free = name.endswith(spared) or "_embed." in name
        assert (id(parameter) in free) == is_free, name
        assert (id(parameter) in decayed) != is_free, name


def test_codes_and_norms_of_a_tokenizer_are_not_decayed_but_convolutions_are() -> None:
    tokenizer = tiny_tokenizer()
    decayed = {id(p) for p in build_optimizer_of(tokenizer, 0.05).param_groups[0]["params"]}
    for name, parameter in tokenizer.named_parameters():
        is_kernel = parameter.dim() == 4
        assert (id(parameter) in decayed) == is_kernel, name


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_transformer()
    model.trunk.requires_grad_(False)
    held = {id(p) for group in build_optimizer_of(model, 0.1).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("first", [0.05, 0.0])
def test_progress_reaches_the_optimizer(first: float) -> None:
    optimizer = build_optimizer_of(tiny_transformer(), first)
    decayed, free = optimizer.param_groups
    for progress in (0.0, 0.5, 1.0, 0.5):  # a decay of nothing must not be the end of decaying
        set_progress(optimizer, progress, lr=2.0, weight_decay=(first, 0.08))
        expected = weight_decay_at(progress, first, 0.08)
        assert (decayed["weight_decay"], free["weight_decay"]) == (pytest.approx(expected), 0.0)
        assert decayed["lr"] == free["lr"] == 2.0 * lr_factor(progress)


def build_optimizer_of(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=weight_decay)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    return optimizer


def test_a_projection_that_starts_as_the_identity_learns_at_its_share_of_the_rate() -> None:
    model = tiny_transformer("implicit", trunk=replace(IMPLICIT, projection="identity"))
    optimizer = build_optimizer_of(model, 0.05)
    set_progress(optimizer, 0.05, lr=2e-3, weight_decay=(0.05, 0.05))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(6e-4 if "projection_" in name else 2e-3), name
        if "projection_" in name:
            assert decays[id(parameter)] == (0.05 if name.endswith("weight") else 0.0), name


def test_a_model_without_factors_has_the_two_groups_that_saved_states_have() -> None:
    assert len(build_optimizer_of(tiny_transformer("implicit"), 0.05).param_groups) == 2

"""The penalty that asks the implicit block to stand still where training's iterations end."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import IMPLICIT, SIDES, TRANSFORMER, tiny_config, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor

from viar import ExplicitTrunkConfig, ImplicitTrunkConfig, NextScaleTransformer, TransformerConfig
from viar.data import TensorImages
from viar.model.implicit import ImplicitTrunk, squared_residual
from viar.model.scales import block_causal
from viar.model.trunk import TrunkOutput
from viar.training import TRANSFORMERS, TrainConfig, train_transformer

ALONE = ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(2, 2), grad=(1, 1), iterations=3)
TOKENS = sum(side**2 for side in SIDES)


def a_trunk(weight: float, **changes: object) -> ImplicitTrunk:
    trunk = dataclasses.replace(ALONE, residual_weight=weight, **changes)
    found = tiny_transformer(trunk=trunk).trunk
    assert isinstance(found, ImplicitTrunk)
    return found


def an_input() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, TOKENS, 16, generator=generator), torch.randn(2, 16, generator=generator)


def run(trunk: ImplicitTrunk) -> TrunkOutput:
    x, cond = an_input()
    generator = torch.Generator().manual_seed(0)
    return trunk(x, trunk.modulate(cond), causal=block_causal(SIDES), generator=generator)


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||new|| of each sample, (B,)."""
    return (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)


@given(weight=st.floats(1e-3, 1e3))
def test_the_penalty_is_the_weighted_change_of_one_more_evaluation(weight: float) -> None:
    trunk = a_trunk(weight)
    z, penalty, _ = run(trunk)
    z = z.detach()
    with torch.no_grad():
        (x, cond), cell = an_input(), trunk.layer.cell
        image = cell(z, cell.inject(x), cell.block.modulate(cond), block_causal(SIDES))
    changes = relative_change(image.view(-1, 1, 16), z.view(-1, 1, 16))  # of each token
    expected = weight * changes.square().mean()
    assert penalty is not None
    assert float(expected) > 1e-9
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-4, atol=0)


def test_the_penalty_leaves_what_the_trunk_returns_alone() -> None:
    assert run(a_trunk(10.0)).x_BLC.equal(run(a_trunk(0.0)).x_BLC)


def test_a_residual_has_no_gradient_through_its_denominator() -> None:
    old = torch.tensor([[[3.0, 0.0], [1.0, 2.0]]], requires_grad=True)
    new = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], requires_grad=True)
    squared_residual(new, old).backward()
    assert new.grad is not None
    assert old.grad is not None
    expected = torch.tensor([[[0.0, 4 / 25], [0.0, -2.0]]])  # (new - old) / ||new||^2
    torch.testing.assert_close(new.grad, expected)
    torch.testing.assert_close(old.grad, -expected)


def test_the_penalty_moves_the_block_and_what_comes_before_it() -> None:
    trunk = a_trunk(1.0, num_pre=1)
    penalty = run(trunk).penalty
    assert penalty is not None
    penalty.backward()
    for name in ("pre.0.fc1.weight", "layer.cell.projection_in.weight", "layer.cell.block.fc2.weight"):
        gradient = trunk.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.norm() > 0, name


def test_a_call_leaves_nothing_on_the_trunk_so_it_can_be_copied_after() -> None:
    trunk = a_trunk(1.0)
    before = {name: dict(vars(module)) for name, module in trunk.named_modules()}
    first = run(trunk)
    assert {name: dict(vars(module)) for name, module in trunk.named_modules()} == before
    second = run(copy.deepcopy(trunk))
    assert first.x_BLC.equal(second.x_BLC)
    assert first.penalty is not None
    assert first.penalty.equal(second.penalty)


def test_no_penalty_without_a_weight_without_gradients_or_of_an_explicit_trunk() -> None:
    plain, weighted, explicit = a_trunk(0.0), a_trunk(1.0), tiny_transformer("explicit").trunk
    outputs = [run(plain), run(explicit)]
    with torch.no_grad():
        outputs.append(run(weighted))
    assert [output.penalty for output in outputs] == [None] * 3


def test_the_block_is_evaluated_once_more_with_a_weight_only() -> None:
    counts = []
    for weight in (0.0, 1.0):
        trunk, calls = a_trunk(weight), []
        trunk.layer.cell.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        run(trunk)
        counts.append(len(calls))
    assert counts == [3, 4]


# Training


def train(folder: Path, weight: float, **changes: object) -> NextScaleTransformer:
    labels = torch.arange(24) % 3
    data = TensorImages(uniform(24, 3, 6, 6) * 0.4 - 0.9 + 0.6 * labels.view(-1, 1, 1, 1), labels)
    model = tiny_transformer(trunk=dataclasses.replace(IMPLICIT, residual_weight=weight))
    config = TrainConfig(**{"steps": 40, "batch_size": 24, "lr": 1e-2, "save_every": 1e9, **changes})
    train_transformer(model, tiny_tokenizer(), data, folder, config)
    return model


@torch.no_grad()
def residual_at(model: NextScaleTransformer, iterations: int) -> float:
    generator = torch.Generator().manual_seed(3)
    labels, inputs = torch.tensor([0, 1, 2]), torch.randn(3, TOKENS - 1, 4, generator=generator)
    states: list[Tensor] = []
    handle = model.trunk.layer.cell.register_forward_hook(lambda *call: states.append(call[-1]))
    model(labels, inputs, iterations=iterations + 1)
    handle.remove()
    return float(relative_change(states[-1], states[-2]).max())


def test_a_trained_block_converges_faster_with_a_weight(tmp_path: Path) -> None:
    plain, weighted = train(tmp_path / "plain", 0.0), train(tmp_path / "weighted", 10.0)
    assert residual_at(weighted, 2) < 0.5 * residual_at(plain, 2)


def test_the_log_tells_penalty_and_cross_entropy_apart(tmp_path: Path) -> None:
    train(tmp_path / "weighted", 1.0, steps=1)
    train(tmp_path / "plain", 0.0, steps=1)
    weighted, plain = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("weighted", "plain")
    )
    assert weighted["loss"] == pytest.approx(weighted["cross_entropy"] + weighted["penalty"])
    assert weighted["penalty"] > 0
    assert weighted["cross_entropy"] == pytest.approx(plain["loss"])
    assert set(weighted) - set(plain) == {"cross_entropy", "penalty"}


def test_a_batch_in_parts_is_penalised_like_a_whole_one(tmp_path: Path) -> None:
    changes = {"steps": 2, "lr": 1e-3}
    whole = train(tmp_path / "whole", 3.0, **changes)
    parts = train(tmp_path / "parts", 3.0, accumulate=4, **changes)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


# Settings


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_is_a_finite_number_of_at_least_zero(weight: float) -> None:
    with pytest.raises(ValueError, match=f"residual_weight must be a finite number .* got {weight}"):
        ImplicitTrunkConfig(residual_weight=weight)


def test_a_weight_is_kept_with_the_model_and_models_saved_before_there_was_one_have_none() -> None:
    config = tiny_config(trunk=dataclasses.replace(IMPLICIT, residual_weight=0.5))
    values = config.to_dict()
    assert TransformerConfig.from_dict(values) == config
    del values["trunk"]["residual_weight"]
    assert TransformerConfig.from_dict(values) == dataclasses.replace(TRANSFORMER, trunk=IMPLICIT)


def test_published_recipes_have_no_weight() -> None:
    trunks = {name: recipe.model.trunk for name, recipe in TRANSFORMERS.items() if "imagenet" in name}
    assert len(trunks) == 7
    for name, trunk in trunks.items():
        assert isinstance(trunk, ExplicitTrunkConfig) or trunk.residual_weight == 0, name

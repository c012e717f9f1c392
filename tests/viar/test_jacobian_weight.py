"""The penalty on the size of the implicit block's Jacobian where training's iterations end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import IMPLICIT, SIDES, TRANSFORMER, tiny_config, tiny_transformer
from torch import Tensor

from viar import ImplicitTrunkConfig, TransformerConfig
from viar.model.implicit import ImplicitTrunk
from viar.model.scales import block_causal
from viar.model.trunk import TrunkOutput
from viar.training import TrainConfig
from viar.training.settings import compare_settings

ALONE = ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(0, 2), grad=(1, 2))
TOKENS = sum(side**2 for side in SIDES)
WIDTH = 16


def a_trunk(weight: float, **changes: object) -> ImplicitTrunk:
    found = tiny_transformer(trunk=dataclasses.replace(ALONE, jacobian_weight=weight, **changes)).trunk
    assert isinstance(found, ImplicitTrunk)
    return found


def an_input() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, TOKENS, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


def run(trunk: ImplicitTrunk, seed: int = 0) -> TrunkOutput:
    x, cond = an_input()
    causal, generator = block_causal(SIDES), torch.Generator().manual_seed(seed)
    return trunk(x, trunk.modulate(cond), causal=causal, generator=generator)


def penalty(trunk: ImplicitTrunk, seed: int = 0) -> Tensor:
    found = run(trunk, seed).penalty
    assert found is not None
    return found


def test_the_penalty_is_the_weighted_mean_square_size_of_the_jacobian() -> None:
    trunk = a_trunk(3.0, no_grad=(1, 1), grad=(1, 1))
    (x, cond), cell = an_input(), trunk.layer.cell
    with torch.no_grad():
        z = run(a_trunk(0.0, no_grad=(1, 1), grad=(1, 1), iterations=2)).x_BLC
        inputs = (cell.inject(x), cell.block.modulate(cond), block_causal(SIDES))
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, *inputs), z)
    size = TOKENS * WIDTH
    square = jacobian.square().sum() / (2 * size)  # samples do not meet: blocks between them are zero
    found = torch.stack([penalty(trunk, seed).detach() for seed in range(100)])
    spread = found.std() / math.sqrt(len(found))
    assert spread < 0.03 * found.mean()
    assert abs(found.mean() - 3.0 * square) < 5 * spread


def test_the_penalty_leaves_what_the_trunk_returns_and_pytorchs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    weighted = run(a_trunk(10.0), seed=4)
    torch.set_rng_state(before)
    assert weighted.x_BLC.equal(run(a_trunk(0.0), seed=4).x_BLC)
    trunk = a_trunk(10.0)
    before = torch.get_rng_state()
    run(trunk)
    assert torch.get_rng_state().equal(before)


def test_one_generator_gives_one_penalty_and_another_another() -> None:
    trunk = a_trunk(1.0, no_grad=(0, 0), grad=(1, 1))
    first, again, other = penalty(trunk, 0), penalty(trunk, 0), penalty(trunk, 1)
    assert first.equal(again)
    assert not first.equal(other)


def test_the_penalty_moves_the_block_and_what_comes_before_it_but_not_through_the_state() -> None:
    trunk = a_trunk(1.0, num_pre=1)
    penalty(trunk).backward()
    for name in ("pre.0.fc1.weight", "layer.cell.projection_in.weight", "layer.cell.block.fc2.weight"):
        gradient = trunk.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.norm() > 0, name


def test_both_penalties_add_up() -> None:
    jacobian, residual = penalty(a_trunk(2.0)), penalty(a_trunk(0.0, residual_weight=0.5))
    torch.testing.assert_close(penalty(a_trunk(2.0, residual_weight=0.5)), jacobian + residual)


def test_a_step_against_the_penalty_makes_the_jacobian_smaller() -> None:
    trunk = a_trunk(1.0, no_grad=(1, 1), grad=(1, 1))
    optimizer = torch.optim.Adam(trunk.parameters(), lr=3e-3)
    sizes = []
    for step in range(20):
        size = penalty(trunk, step)
        sizes.append(float(size.detach()))
        optimizer.zero_grad()
        size.backward()
        optimizer.step()
    assert sizes[-1] < 0.5 * sizes[0]


def test_no_penalty_without_gradients() -> None:
    with torch.no_grad():
        assert run(a_trunk(1.0)).penalty is None


def test_a_penalty_under_autocast_is_near_that_in_float32() -> None:
    trunk = a_trunk(1.0, no_grad=(0, 0), grad=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = penalty(trunk)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, penalty(trunk), rtol=0.05, atol=0)
    low.backward()
    gradient = trunk.get_parameter("layer.cell.block.fc2.weight").grad
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_is_a_finite_number_of_at_least_zero(weight: float) -> None:
    with pytest.raises(ValueError, match=f"jacobian_weight must be a finite number .* got {weight}"):
        ImplicitTrunkConfig(jacobian_weight=weight)


def test_models_saved_before_there_was_a_weight_have_none() -> None:
    values = tiny_config(trunk=dataclasses.replace(IMPLICIT, jacobian_weight=0.5)).to_dict()
    del values["trunk"]["jacobian_weight"]
    assert TransformerConfig.from_dict(values) == dataclasses.replace(TRANSFORMER, trunk=IMPLICIT)


def test_a_run_of_a_release_that_had_no_weight_goes_on(tmp_path: Path) -> None:
    train = dataclasses.asdict(TrainConfig(steps=1))
    now = {
        "kind": "transformer",
        "model": tiny_config().to_dict(),
        "train": train,
        "data": {"augmentations": []},
    }
    before = json.loads(json.dumps(now))
    del before["model"]["trunk"]["jacobian_weight"]
    (tmp_path / "state").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert compare_settings(tmp_path, json.loads(json.dumps(now))) == []
    now["model"]["trunk"]["jacobian_weight"] = 1.0
    with pytest.raises(ValueError, match=r"model.trunk.jacobian_weight: 0.0 there, 1.0 now"):
        compare_settings(tmp_path, json.loads(json.dumps(now)))

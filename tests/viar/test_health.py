"""Residual and spectral radius of the implicit block while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import SIDES, tiny_transformer
from torch import Tensor

from viar.data import TokenBatch
from viar.training.health import NUM_SAMPLES, cell_health


def a_batch(size: int = 3, sides: Sequence[int] = SIDES) -> TokenBatch:
    generator, tokens = torch.Generator().manual_seed(5), sum(side**2 for side in sides)
    inputs = torch.randn(size, tokens - 1, 4, generator=generator)
    return inputs, torch.zeros(size, tokens, dtype=torch.long), torch.arange(size) % 3


@torch.no_grad()
def last_evaluation(model: torch.nn.Module, batch: TokenBatch, iterations: int) -> tuple[Tensor, ...]:
    """What the cell was given, and what it gave, each (B, L, C) first."""
    calls: list[tuple[Tensor, ...]] = []
    cell = model.trunk.layer.cell
    handle = cell.register_forward_hook(lambda cell, args, output: calls.append((output, *args)))
    model(batch[2], batch[0], iterations=iterations)
    handle.remove()
    return calls[-1]


@pytest.mark.parametrize(("seed", "iterations"), [(0, 1), (1, 2), (2, 6)])
def test_they_are_those_of_the_whole_jacobian_at_the_last_evaluation(seed: int, iterations: int) -> None:
    model, batch = tiny_transformer(seed=seed, sides=(1, 2)), a_batch(1, (1, 2))
    found = cell_health(model, batch, iterations=iterations)
    image, z, *others = last_evaluation(model, batch, iterations)
    assert found["residual"] == pytest.approx(float((image - z).norm() / image.norm()), rel=1e-4, abs=1e-6)
    cell = model.trunk.layer.cell
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, *others), z)
    radius = torch.linalg.eigvals(jacobian.reshape(z.numel(), -1).double()).abs().max()
    assert found["spectral_radius"] == pytest.approx(float(radius), rel=0.1)


def test_a_block_that_does_not_feel_its_state_stands_still_and_has_no_jacobian() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.trunk.layer.cell.projection_in.weight[:, :16].zero_()
    found = cell_health(model, a_batch(), iterations=2)
    assert found == pytest.approx({"residual": 0, "spectral_radius": 0}, abs=1e-6)


def test_an_explicit_trunk_has_none() -> None:
    assert cell_health(tiny_transformer("explicit"), a_batch()) == {}


def test_measuring_leaves_model_and_random_numbers_as_they_were_and_gives_the_same_again() -> None:
    model = tiny_transformer(drop_path=0.5, label_dropout=0.5).train()
    before = torch.get_rng_state()
    first = cell_health(model, a_batch())
    assert torch.get_rng_state().equal(before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.trunk.layer.cell._forward_pre_hooks
    torch.rand(3)
    assert cell_health(model, a_batch()) == first


def test_the_first_samples_of_a_batch_are_enough() -> None:
    model, batch = tiny_transformer(), a_batch(2 * NUM_SAMPLES)
    few = tuple(part[:NUM_SAMPLES] for part in batch)
    assert cell_health(model, batch) == cell_health(model, few)
    with pytest.raises(ValueError, match="at least 1 sample"):
        cell_health(model, tuple(part[:0] for part in batch))


def test_a_compiled_block_is_measured_as_it_is() -> None:
    model = tiny_transformer()
    expected = cell_health(model, a_batch())
    model.trunk.layer.cell.compile(backend="eager")
    with torch.no_grad():
        model(a_batch()[2], a_batch()[0])
    assert cell_health(model, a_batch()) == pytest.approx(expected, rel=1e-4)


def test_weights_in_bfloat16_are_measured_in_their_type() -> None:
    model = tiny_transformer()
    expected = cell_health(model, a_batch(), iterations=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cell_health(model.bfloat16(), a_batch(), iterations=2)
    assert found == pytest.approx(expected, rel=0.1)

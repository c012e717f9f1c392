"""Training that keeps what goes into blocks, and evaluates them again in the backward pass."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMPLICIT, SIDES, tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from viar import ExplicitTrunkConfig, ImplicitTrunkConfig, NextScaleTransformer
from viar.data import TensorImages
from viar.model.config import TrunkConfig
from viar.training import TrainConfig, train_tokenizer, train_transformer
from viar.training.losses import transformer_loss

TOKENS = sum(side**2 for side in SIDES)
DEEP = ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(0, 0), grad=(8, 8))
TRUNKS: dict[str, TrunkConfig] = {
    "explicit": ExplicitTrunkConfig(),
    "implicit": replace(IMPLICIT, no_grad=(1, 3), grad=(2, 4)),
    "residual": replace(IMPLICIT, residual_weight=0.5),
    "jacobian": replace(IMPLICIT, jacobian_weight=0.5),
}


def a_batch(size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(size, TOKENS - 1, 4, generator=generator)
    targets = torch.randint(16, (size, TOKENS), generator=generator)
    return inputs, targets, torch.arange(size) % 3


def a_step(model: NextScaleTransformer, seed: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of one step in training mode."""
    torch.manual_seed(seed)  # of drop path and label dropout
    model.train().zero_grad()
    loss, _ = transformer_loss(None, seed=seed)(model, a_batch(), seed)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
@given(seed=st.integers(0, 999), drop_path=st.sampled_from([0.0, 0.5]))
@settings(max_examples=8)
def test_losses_and_gradients_are_those_of_a_step_that_keeps_all(
    trunk: TrunkConfig, seed: int, drop_path: float
) -> None:
    model = tiny_transformer(trunk=trunk, drop_path=drop_path, label_dropout=0.3)
    found = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        found.append((*a_step(model, seed), torch.get_rng_state()))
    (loss, gradients, state), (loss_again, gradients_again, state_again) = found
    assert loss.equal(loss_again)
    assert state.equal(state_again)
    for a, b in zip(gradients, gradients_again, strict=True):
        assert a is b is None or (a is not None and b is not None and a.equal(b))


class Storages(TorchDispatchMode):
    """Notes every storage that is made, to count those that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def bytes_kept(trunk: TrunkConfig, depth: int = 3, *, enabled: bool) -> int:
    """Of a forward pass by its tape, counted exactly."""
    model = tiny_transformer(trunk=trunk, depth=depth).train()
    model.checkpoint_activations(enabled)
    batch = a_batch(size=16)
    with Storages() as storages:
        loss, _ = transformer_loss(None, seed=0)(model, batch, 0)
        gc.collect()
        total = storages.alive()
    assert loss.requires_grad
    return total


def test_a_block_and_an_iteration_each_keep_little_more_than_what_goes_into_them() -> None:
    state = 16 * TOKENS * 16 * 4  # bytes of (B, L, C), for few tokens: what modulates them counts too
    for enabled, least, most in ((False, 20, 30), (True, 1, 3)):
        blocks = [bytes_kept(ExplicitTrunkConfig(), depth, enabled=enabled) for depth in (3, 11)]
        iterations = [bytes_kept(replace(DEEP, grad=(n, n)), enabled=enabled) for n in (2, 10)]
        each = [(more - few) / 8 / state for few, more in (blocks, iterations)]
        assert all(least <= share <= most for share in each), (enabled, each)


def test_iterations_off_the_tape_keep_nothing_with_checkpoints_either() -> None:
    few, many = (bytes_kept(replace(DEEP, no_grad=(n, n)), enabled=True) for n in (1, 100))
    assert many == few


def test_nothing_is_evaluated_again_where_no_gradient_is_recorded() -> None:
    model = tiny_transformer()
    model.checkpoint_activations()
    inputs, _, labels = a_batch()
    with torch.no_grad():
        before = model(labels, inputs)
        model.checkpoint_activations(False)
        assert before.equal(model(labels, inputs))


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_losses_under_autocast_are_those_of_a_step_that_keeps_all(kind: str) -> None:
    model = tiny_transformer(kind, drop_path=0.5)
    found = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(a_step(model))
    assert found[0][0].equal(found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        if a is not None and b is not None:
            assert (a - b).norm() <= 0.02 * a.norm()  # casts are summed in another order


def some_images() -> TensorImages:
    return TensorImages(uniform(8, 3, 6, 6) * 2 - 1, torch.arange(8) % 3)


def test_a_run_with_checkpoints_ends_at_the_same_weights(tmp_path: Path) -> None:
    ends = []
    for enabled in (False, True):
        model = tiny_transformer(drop_path=0.3)
        config = TrainConfig(steps=3, batch_size=4, lr=1e-2, checkpoint_activations=enabled)
        train_transformer(model, tiny_tokenizer(), some_images(), tmp_path / str(enabled), config)
        assert model.trunk.checkpoint_activations == enabled
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        assert tensor.equal(ends[1][name]), name


def test_a_tokenizer_has_no_blocks_to_evaluate_again(tmp_path: Path) -> None:
    config = TrainConfig(steps=1, batch_size=4, checkpoint_activations=True)
    with pytest.raises(ValueError, match="checkpoint_activations is for the blocks of a transformer"):
        train_tokenizer(tiny_tokenizer(), some_images(), tmp_path, config)

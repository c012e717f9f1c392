"""The adversarial loss of a tokenizer: the discriminator, the formulas, and a run with both players."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from test_train import Interrupted, assert_same, fresh_tokenizer, interrupt_at, logged, pictures, settings
from tiny_models import uniform
from torch import Tensor, nn

import viar.training.loop
from viar import Tokenizer
from viar.tokenizer import Discriminator
from viar.tokenizer.discriminator import patch_side
from viar.training import AdversarialConfig, TrainConfig, train_tokenizer
from viar.training.adversarial import adaptive_weight, discriminator_loss, generator_loss
from viar.training.critic import Critic


def small(image_side: int = 6, **changes: Any) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(image_side, **{"base_channels": 4, **changes})


def adversarial(**changes: Any) -> AdversarialConfig:
    return AdversarialConfig(**{"weight": 0.8, "start": 2, "base_channels": 4, **changes})


def run_adversarial(
    folder: Path, config: TrainConfig, players: AdversarialConfig | None = None, **changes: Any
) -> Tokenizer:
    tokenizer = fresh_tokenizer()
    train_tokenizer(
        tokenizer, pictures(), folder, config, adversarial=players or adversarial(), revive_every=2, **changes
    )
    return tokenizer


# The discriminator


@pytest.mark.parametrize(("num_layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_an_answer_depends_on_the_pixels_of_its_patch_and_no_others(num_layers: int, side: int) -> None:
    discriminator = small(96, num_layers=num_layers, base_channels=2)
    # Statistics of a norm are of the whole picture.
    layers = [nn.Identity() if isinstance(x, nn.GroupNorm) else x for x in discriminator.layers]
    images = uniform(1, 3, 96, 96).requires_grad_()
    logits = nn.Sequential(*layers)(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    assert [int(x.max() - x.min()) + 1 for x in (rows, columns)] == [side, side]
    assert patch_side(num_layers) == side


def test_what_is_said_of_a_picture_does_not_depend_on_those_beside_it() -> None:
    discriminator, images = small(24), uniform(5, 3, 24, 24)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone)


@pytest.mark.parametrize(("image_side", "num_layers"), [(6, 1), (33, 1), (34, 2), (69, 2), (70, 3), (512, 3)])
def test_layers_are_as_many_as_their_patches_fit_into_the_picture(image_side: int, num_layers: int) -> None:
    strides = [x.stride[0] for x in Discriminator(image_side, base_channels=1).layers if hasattr(x, "stride")]
    assert strides == [2] * num_layers + [1, 1]


def test_the_smallest_picture_is_judged_and_a_smaller_one_refused() -> None:
    assert small(12, num_layers=2)(uniform(2, 3, 12, 12)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="num_layers=2 needs pictures of at least 12 pixels a side, got 11"):
        small(11, num_layers=2)
    with pytest.raises(ValueError, match="Discriminator: base_channels must be at least 1, got 0"):
        small(base_channels=0)


def test_any_number_of_channels_will_do() -> None:
    for base_channels in (1, 2, 3, 9, 16, 30):
        assert small(base_channels=base_channels)(uniform(1, 3, 6, 6)).shape == (1, 1, 1, 1)


def test_the_published_sizes_have_the_published_parameters() -> None:
    sizes = [tuple(x.weight.shape[:2]) for x in Discriminator(256).layers if isinstance(x, nn.Conv2d)]
    assert sizes == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    weight = Discriminator(256).layers[-4].weight
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.01)


# The formulas


def test_the_hinge_loss_at_given_logits() -> None:
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert float(discriminator_loss(real, made)) == pytest.approx((0 + 0.5 + 2) / 6 + (0 + 1 + 4) / 6)
    assert float(generator_loss(made)) == pytest.approx(-1 / 3)
    assert float(discriminator_loss(torch.full((3,), 1.0), torch.full((3,), -1.0))) == 0


@given(st.floats(0, 100), st.floats(0.1, 100), st.floats(-3, 3))
def test_the_weighted_loss_moves_the_last_layer_as_much_as_the_others_do(
    a: float, b: float, c: float
) -> None:
    layer = torch.tensor([1.0, 1.0], requires_grad=True)
    others, against = layer @ torch.tensor([a, 0.0]), layer @ torch.tensor([c, b])
    weight = adaptive_weight(others, against, layer)
    assert layer.grad is None
    assert not weight.requires_grad
    assert float(weight) == pytest.approx(a / ((b * b + c * c) ** 0.5 + 1e-4), rel=1e-4)


def test_the_weight_is_bounded_and_does_not_vanish_in_float16() -> None:
    layer = torch.ones((), requires_grad=True)
    assert float(adaptive_weight(3 * layer, 0 * layer, layer)) == 1e4
    pixels = layer.expand(100_000).half().float()  # the gradient of each is below the least of float16
    weight = adaptive_weight((2e-8 * pixels).sum(), (1e-8 * pixels).sum(), layer)
    assert float(weight) == pytest.approx(2e-3 / (1e-3 + 1e-4), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight must be at least 0, got -1.0"),
        ({"weight": float("nan")}, "weight must be at least 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"base_channels": 0}, "base_channels must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"betas": (0.5, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdversarialConfig: {message}"):
        adversarial(**changes)


# The two players

SOUND = torch.ones(())  # the tokenizer's step was not left out


def prepared(num_parts: int) -> tuple[Critic, Accelerator]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=num_parts)
    critic = Critic(small(), adversarial(), lr=1e-2)
    critic.prepare(accelerator)
    return critic, accelerator


def shown(critic: Critic, images: Tensor, decoder: nn.Module) -> Tensor:
    made = decoder(images)
    loss, _ = critic.against(images, made, others=made.square().mean(), last_layer=decoder.weight)
    return loss


def test_no_player_leaves_a_gradient_with_the_other() -> None:
    critic, accelerator = prepared(1)
    decoder = nn.Conv2d(3, 3, 1)
    loss = shown(critic, uniform(4, 3, 6, 6), decoder)
    loss.backward()
    assert decoder.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.module.parameters())
    before, decoder.weight.grad = copy.deepcopy(critic.module), None
    numbers = critic.step(accelerator, 0.5, 2.0, SOUND)
    assert decoder.weight.grad is None
    assert any(not a.equal(b) for a, b in zip(critic.module.parameters(), before.parameters(), strict=True))
    assert numbers.keys() == {"discriminator", "discriminator_skipped"}
    assert critic.step(accelerator, 0.5, 2.0, SOUND) == {}  # there is nothing new to learn from


def test_a_discriminator_leaves_out_the_steps_of_the_tokenizer_and_its_own_and_counts_them() -> None:
    critic, accelerator = prepared(1)
    decoder = nn.Conv2d(3, 3, 1)

    def weights_after(images: Tensor, sound: float) -> tuple[Tensor, float]:
        shown(critic, images, decoder)
        numbers = critic.step(accelerator, 0.5, 2.0, torch.tensor(sound))
        flat = torch.cat([p.detach().flatten() for p in critic.module.parameters()])
        return flat, float(numbers["discriminator_skipped"])

    images = uniform(4, 3, 6, 6)
    first, skipped = weights_after(images, 1.0)
    assert skipped == 0
    for broken, sound, expected in ((images, 0.0, 1), (images * math.nan, 1.0, 2)):
        after, skipped = weights_after(broken, sound)
        assert after.equal(first)
        assert skipped == expected
    again, _ = prepared(1)
    again.load_state_dict(critic.state_dict())
    assert again.state_dict() == {"skipped": 2}
    after, skipped = weights_after(images, 1.0)
    assert not after.equal(first)
    assert skipped == 2


def test_a_discriminator_that_learns_in_parts_learns_what_one_of_the_whole_does() -> None:
    images, decoder = uniform(8, 3, 6, 6), nn.Conv2d(3, 3, 1)
    trained = []
    for num_parts in (1, 4):
        critic, accelerator = prepared(num_parts)
        for _ in range(2):
            for part in images.chunk(num_parts):
                shown(critic, part, decoder)
            critic.step(accelerator, 0.5, 2.0, SOUND)
        trained.append(critic.module)
    assert_same(*trained, atol=1e-5, rtol=1e-4)


def test_a_discriminator_learns_to_tell_pictures_from_blurred_ones() -> None:
    critic, accelerator = prepared(1)
    images = uniform(32, 3, 6, 6) * 2 - 1
    blur = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
    nn.init.constant_(blur.weight, 1 / 9)
    losses = []
    for _ in range(40):
        shown(critic, images, blur)
        losses.append(float(critic.step(accelerator, 0.05, 2.0, SOUND)["discriminator"]))
    assert losses[-1] < 0.2 * losses[0]


# Runs


def test_before_its_start_a_run_is_the_run_without_and_the_discriminator_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fresh_tokenizer()
    train_tokenizer(plain, pictures(), tmp_path / "plain", settings(), revive_every=2)
    calls: list[None] = []
    forward = Discriminator.forward

    def counting(self: Discriminator, images: Tensor) -> Tensor:
        calls.append(None)
        return forward(self, images)

    monkeypatch.setattr(Discriminator, "forward", counting)
    late = run_adversarial(tmp_path / "late", settings(), adversarial(start=3))
    assert_same(late, plain)
    assert logged(tmp_path / "late") == logged(tmp_path / "plain")
    assert not calls
    early = run_adversarial(tmp_path / "early", settings(accumulate=2))
    assert len(calls) == 2 * 2  # of each of two parts of the third step: once for each player
    assert any(not a.equal(b) for a, b in zip(early.parameters(), plain.parameters(), strict=True))


def test_a_run_with_a_discriminator_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(steps=5, save_every=1e-9, mixed_precision="bf16", accumulate=2)
    expected = run_adversarial(tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        # A step of the discriminator with moments, and one of the tokenizer that feels it, are to come.
        interrupt_at(patch, 4, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run_adversarial(tmp_path / "parts", config)
    assert_same(run_adversarial(tmp_path / "parts", config), expected)


def test_a_run_does_not_go_on_with_another_discriminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_every=1e-9)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run_adversarial(tmp_path, config)
    assert json.loads((tmp_path / "run.json").read_text())["adversarial"]["start"] == 2
    with pytest.raises(ValueError, match=r"adversarial.weight: 0.8 there, 0.7 now"):
        run_adversarial(tmp_path, config, adversarial(weight=0.7))
    with pytest.raises(ValueError, match=r"adversarial.weight: 0.8 there, null now"):
        run_adversarial(tmp_path, config, adversarial(weight=0.0))


def test_what_both_players_lose_is_logged_from_the_start_on(tmp_path: Path) -> None:
    run_adversarial(tmp_path, settings(steps=10))
    first, last = logged(tmp_path)
    names = {"adversarial", "adversarial_weight", "discriminator"}
    assert not names & first.keys()
    assert names <= last.keys()
    rest = last["reconstruction"] + last["quantizer"]
    expected = rest + last["adversarial_weight"] * last["adversarial"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)


def test_pictures_too_small_for_the_layers_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_layers=2 needs pictures of at least 12 pixels a side, got 6"):
        run_adversarial(tmp_path / "run", settings(), adversarial(num_layers=2))
    assert not (tmp_path / "run").exists()

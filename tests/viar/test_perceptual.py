"""Perceptual losses: the distance in the eyes of a network, LPIPS, and what the command line names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call
from test_train import Interrupted, fresh_tokenizer, interrupt_at, logged, pictures, settings
from tiny_models import uniform
from torch import Tensor, nn

import viar.training.loop
from viar.evaluation import Classifier
from viar.training import FeatureDistance, lpips_distance, train_tokenizer


class Scaled(nn.Module):
    """Two feature maps, of which one has channels in the place of colours."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.factor * images, images.flatten(2).transpose(1, 2).exp()]


# The distance


def test_the_distance_of_known_features() -> None:
    red, green = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    red[:, 0], green[:, 1], green[1] = 5.0, 7.0, 3.0
    expected = (2 + (2 - 2 / 3**0.5)) / 2  # of unit vectors at right angles, and of one with the diagonal
    assert float(FeatureDistance(nn.Identity())(red, green)) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 1000), st.floats(0.5, 100))
def test_a_distance_is_symmetric_zero_of_the_same_and_blind_to_the_scale_of_a_map(
    seed: int, factor: float
) -> None:
    a, b = uniform(2, 2, 3, 5, 5, seed=seed) - 0.5
    distance = FeatureDistance(Scaled())(a, b)
    assert distance.shape == ()
    assert float(distance) == pytest.approx(float(FeatureDistance(Scaled())(b, a)))
    assert float(FeatureDistance(Scaled())(a, a)) == 0
    assert 0 < float(distance) < 4
    assert float(FeatureDistance(Scaled(factor))(a, b)) == pytest.approx(float(distance), rel=1e-2)


def test_the_gradient_is_finite_where_a_network_sees_nothing() -> None:
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    FeatureDistance(nn.Identity())(uniform(1, 3, 4, 4), images).backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda x: x.sum(), r"got \(\)"),
        (lambda x: [x, "map"], "got str"),
        (lambda x: x[:1], r"B = 2 images, got \(1, 3, 4, 4\)"),
        (lambda x: [], "at least one feature map"),
    ],
)
def test_what_is_no_feature_map_is_refused(give: Any, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return give(images)

    with pytest.raises(ValueError, match=f"features must give .*{message}"):
        FeatureDistance(Wrong())(uniform(2, 3, 4, 4), uniform(2, 3, 4, 4))


# LPIPS


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the package, and the folder where it looks for weights."""
    package = ModuleType("lpips")
    package.LPIPS = lambda **settings: SimpleNamespace(settings=settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_lpips_is_that_of_vgg_where_its_weights_are_here(lpips: Path) -> None:
    with pytest.raises(ValueError, match=r"lpips: found no weights of VGG .*nothing is downloaded"):
        lpips_distance()
    (lpips / "vgg16-397923af.pth").touch()
    assert lpips_distance().settings == {"net": "vgg", "verbose": False}


def test_lpips_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        ValueError, match=r"lpips: the package cannot be imported .*install lpips and torchvis"
    ):
        lpips_distance()


# Runs


def test_the_distance_is_part_of_the_loss_and_its_network_is_frozen(tmp_path: Path) -> None:
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
    before = features[0].weight.detach().clone()
    distance = FeatureDistance(features)
    train_tokenizer(
        fresh_tokenizer(), pictures(), tmp_path, settings(), perceptual=distance, perceptual_weight=3.0
    )
    (row,) = logged(tmp_path)
    assert row["perceptual"] > 0
    expected = row["reconstruction"] + row["quantizer"] + 3 * row["perceptual"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert features[0].weight.equal(before)
    assert features[0].weight.grad is None
    assert not features.training


def test_a_run_does_not_go_on_with_other_eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(features: nn.Module, weight: float = 1.0) -> None:
        train_tokenizer(
            fresh_tokenizer(),
            pictures(),
            tmp_path,
            settings(save_every=1e-9),
            perceptual=FeatureDistance(features),
            perceptual_weight=weight,
        )

    eyes = nn.Conv2d(3, 4, 3)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, viar.training.loop, "set_progress", after=False)
        with pytest.raises(Interrupted):
            run(eyes)
    with pytest.raises(ValueError, match=r"perceptual.fingerprint: "):
        run(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"perceptual.weight: 1.0 there, 2.0 now"):
        run(eyes, 2.0)
    run(eyes)


# The command line


def test_a_classifier_and_a_discriminator_help_to_train_a_tokenizer(tmp_path: Path) -> None:
    classifier = Classifier(5, 8, width=4).eval()
    classifier.save(tmp_path / "classifier.safetensors")
    images = uniform(2, 3, 8, 8)
    read = Classifier.read(tmp_path / "classifier.safetensors", 8)
    assert read(images).equal(classifier(images))
    assert [tuple(x.shape) for x in read.features()(images)] == [(2, 4, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4)]
    flags = ("--train.steps", 2, "--train.batch-size", 16, "--augment", 0, "--train.sample-every", 0)
    flags += ("--perceptual", tmp_path, "--perceptual-weight", 0.5)
    flags += ("--adversarial.weight", 0.8, "--adversarial.start", 1, "--adversarial.base-channels", 4)
    code, output, errors = call("train-tokenizer", "digits", "--out", tmp_path / "out", *flags)
    assert code == 0, errors
    assert json.loads(output[output.index("{") :])["perceptual"] > 0
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (kept["perceptual"]["weight"], kept["adversarial"]["weight"]) == (0.5, 0.8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--perceptual", "vgg"), "expected lpips or the file of a classifier (classifier.safetensors), got"),
        (
            ("--perceptual", "note.txt"),
            "note.txt: expected the weights of a classifier, found something else",
        ),
        (("--perceptual", "lpips"), "lpips needs images of 16 pixels a side or more, got 8"),
        (("--perceptual-weight", "2"), "--perceptual-weight: no perceptual loss; give --perceptual"),
        (("--adversarial.start", "5"), "--adversarial.start: no adversarial loss; give --adversarial.weight"),
    ],
)
def test_losses_that_cannot_be_are_refused_by_name(
    flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("no weights")
    code, output, errors = call("train-tokenizer", "digits", "--out", "x", "--train.steps", 1, *flags)
    assert code == 2
    assert message in errors + output

"""The classifier that judges: it learns, it is repeatable, it survives its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from viar.data import TensorImages
from viar.evaluation import Classifier, accuracy, train_classifier


def classes_of_stripes(count: int = 64) -> TensorImages:
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    images[labels == 0, :, ::2] += 0.7
    images[labels == 1, :, :, ::2] += 0.7
    return TensorImages(images.clamp(-1, 1), labels)


def test_the_classifier_learns_and_its_seed_decides_what() -> None:
    data = classes_of_stripes()
    twins = []
    for _ in range(2):
        torch.manual_seed(3)
        classifier = Classifier(2, 8, width=4)
        train_classifier(classifier, data, steps=15, batch_size=32, seed=1)
        assert not classifier.training
        twins.append(classifier)
    assert accuracy(twins[0], data) > 0.95
    assert all(a.equal(b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))
    torch.manual_seed(3)
    other = Classifier(2, 8, width=4)
    train_classifier(other, data, steps=15, batch_size=32, seed=2)
    assert any(not a.equal(b) for a, b in zip(other.parameters(), twins[0].parameters(), strict=True))


def test_a_classifier_survives_its_file(tmp_path: Path) -> None:
    classifier = Classifier(5, 12, width=4).eval()
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = Classifier(5, 12, width=4).load(tmp_path / "classifier.safetensors").eval()
    images = torch.randn(3, 3, 12, 12)
    assert classifier(images).shape == (3, 5)
    assert loaded(images).equal(classifier(images))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier(6, 12, width=4).load(tmp_path / "classifier.safetensors")
    with pytest.raises(ValueError, match="image_side: expected a multiple of 4, got 6"):
        Classifier(5, 6)
    save_file({"layers.0.weight": torch.ones(4), "layers.11.bias": torch.ones(5)}, tmp_path / "earlier")
    with pytest.raises(ValueError, match="earlier: expected a classifier with a hidden layer, found"):
        Classifier.read(tmp_path / "earlier", 12)


@pytest.mark.parametrize("side", [8, 32])
def test_features_are_the_hidden_activations_that_decide(side: int) -> None:
    classifier = Classifier(5, side, width=4).eval()
    images = torch.randn(3, 3, side, side)
    embedding = classifier.embed(images)
    assert embedding.shape == (3, classifier.num_features)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(classifier.logits(embedding), classifier(images))
    assert [len(maps[0]) for maps in classifier.features()(images)] == [4, 8, 8]

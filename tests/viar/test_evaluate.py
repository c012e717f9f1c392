"""Measures: class consistency, memory of a training step, the classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_transformer
from torch import Tensor, nn

from viar import ImplicitTrunkConfig
from viar.data import TensorImages
from viar.evaluation import (
    Classifier,
    accuracy,
    balanced_labels,
    class_consistency,
    seconds_of,
    train_classifier,
    training_bytes,
)


def test_training_bytes_of_a_linear_model_are_those_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(10, 8)
    parameters = 8 * 16 + 16 * 4
    # weights, gradients, two moments; kept for the backward pass: the input of each linear layer, of
    # which the second is also what ReLU keeps
    expected = 4 * (4 * parameters + 10 * 8 + 10 * 16)
    assert training_bytes(model, lambda: model(x).sum()) == expected


def test_what_is_kept_twice_is_counted_once() -> None:
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(10, 8)
    assert training_bytes(model, lambda: (model(x) + model(x[:5].repeat(2, 1))).sum()) == 4 * (
        4 * 64 + 2 * 10 * 8
    )
    assert training_bytes(model, lambda: (model(x) + model(x)).sum()) == 4 * (4 * 64 + 10 * 8)


def test_training_bytes_count_the_size_of_numbers() -> None:
    model = nn.Linear(8, 8, bias=False).double()
    assert training_bytes(model, lambda: model(torch.randn(3, 8).double()).sum()) == 8 * (4 * 64 + 3 * 8)


def test_the_deeper_a_training_step_the_more_it_keeps_but_not_for_steps_without_gradient() -> None:
    def bytes_of(no_grad: int, grad: int) -> int:
        trunk = ImplicitTrunkConfig(num_pre=0, num_post=0, no_grad=(no_grad, no_grad), grad=(grad, grad))
        model = tiny_transformer(trunk=trunk).train()
        labels, inputs = torch.tensor([0, 1]), torch.randn(2, 13, 4)
        return training_bytes(model, lambda: model(labels, inputs).sum())

    assert bytes_of(1, 2) == bytes_of(6, 2)
    assert bytes_of(6, 2) - bytes_of(0, 2) == 2 * 14 * 16 * 4  # where it starts is a state of its own
    assert bytes_of(1, 3) - bytes_of(1, 2) == bytes_of(1, 2) - bytes_of(1, 1) > 0


class Brightness(nn.Module):
    """Sees class 1 in bright images, class 0 in dark ones."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.min() >= -1
        brightness = images.mean((1, 2, 3))
        return torch.stack([-brightness, brightness], 1)

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        return iter([torch.zeros(())])


def test_class_consistency_is_the_share_of_images_seen_as_what_was_asked_for() -> None:
    images = torch.tensor([0.9, 0.8, 0.1, 0.3]).view(4, 1, 1, 1).expand(4, 3, 8, 8)  # in [0, 1]
    for labels, expected in (([1, 1, 0, 0], 1.0), ([1, 0, 0, 0], 0.75), ([0, 0, 1, 1], 0.0)):
        assert class_consistency(Brightness(), images, torch.tensor(labels)) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 512])
def test_accuracy_is_the_share_of_images_recognised(batch_size: int) -> None:
    images = torch.tensor([0.9, -0.8, 0.1, -0.3, 0.2]).view(5, 1, 1, 1).expand(5, 3, 8, 8)  # in [-1, 1]
    data = TensorImages(images, torch.tensor([1, 0, 1, 1, 0]))
    assert accuracy(Brightness(), data, batch_size) == 0.6


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


def test_labels_are_balanced() -> None:
    assert balanced_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_tasks_are_timed_in_turns() -> None:
    order = []
    seconds = seconds_of([lambda: order.append("a"), lambda: order.append("b")], repeats=2)
    assert order == ["a", "b", "a", "b"]
    assert len(seconds) == 2
    assert all(taken >= 0 for taken in seconds)

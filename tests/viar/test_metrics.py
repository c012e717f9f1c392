"""What a classifier sees in images: accuracy and class consistency."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer, tiny_transformer, uniform
from torch import Tensor, nn

import viar.evaluation.metrics
from viar.data import TensorImages
from viar.evaluation import accuracy, balanced_labels, class_consistency, inpainting_consistency


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


def test_labels_are_balanced() -> None:
    assert balanced_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_images_are_edited_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_transformer().to("meta"), TensorImages(uniform(5, 3, 6, 6), torch.arange(5) % 3)
    given = []

    def noted(
        model: nn.Module, tokenizer: nn.Module, images: Tensor, mask: Tensor, *rest: Any, **_: Any
    ) -> Tensor:
        given.append((images.device.type, rest[0].device.type))
        return images

    monkeypatch.setattr(viar.evaluation.metrics, "edit", noted)
    monkeypatch.setattr(viar.evaluation.metrics, "class_consistency", lambda *_: 1.0)
    mask = torch.ones(6, 6)
    assert inpainting_consistency(Brightness(), model, tiny_tokenizer(), data, mask, batch_size=3) == 1.0
    assert given == [("meta", "meta")] * 2

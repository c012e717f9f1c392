"""Nothing waits for the device: no generation by fixed counts, no forward pass, no step of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import waiting_images
from tiny_models import uniform
from waiting_images import CASES, pair
from waits import Waits, waiting_on, without_numbers

from viar import edit
from viar.model.transformer import NextScaleTransformer


@without_numbers
def test_no_number_is_needed(device: str) -> None:
    assert waiting_on(device, waiting_images) == {}


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_images.pretend(monkeypatch)
    with Waits() as waits:
        CASES[name]("cpu")
    assert not waits.counts


@pytest.mark.parametrize(("keep", "looks"), [("features", 3), ("codes", 2)])
@pytest.mark.parametrize("mask", [[[1, 0], [0, 0]], [[False, False], [False, True]]])
def test_an_edit_looks_at_picture_and_mask_alone_and_before_the_first_scale(
    keep: str, looks: int, mask: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting_images.pretend(monkeypatch)
    before: list[int] = []
    embed_scale = NextScaleTransformer.embed_scale

    def counted(*arguments: Any) -> Any:
        before.append(waits.counts.total())
        return embed_scale(*arguments)

    monkeypatch.setattr(NextScaleTransformer, "embed_scale", counted)
    with Waits() as waits:
        edit(*pair("cpu", "implicit"), uniform(2, 3, 6, 6), torch.tensor(mask), [0, 1], keep=keep)
    assert before == [looks] * 3
    assert waits.counts.total() == looks

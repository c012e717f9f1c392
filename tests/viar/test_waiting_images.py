"""Nothing waits for the device: no generation by fixed counts, no forward pass, no step of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import waiting_images
from test_train import run_tokenizer, run_transformer, settings
from tiny_models import uniform
from waiting_images import CASES, pair
from waits import Waits, waiting_on, without_numbers

from viar import edit
from viar.model.transformer import NextScaleTransformer
from viar.training import TrainConfig, loop


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


@pytest.mark.parametrize("run", [run_transformer, run_tokenizer])
def test_a_step_of_a_run_reads_nothing(
    run: Callable[[Path, TrainConfig], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting_images.pretend(monkeypatch)
    counts: list[Counter[str]] = []
    step = loop._Run._step

    def counted(*arguments: Any) -> Any:
        with Waits() as waits:
            found = step(*arguments)
        counts.append(waits.counts)
        return found

    monkeypatch.setattr(loop._Run, "_step", counted)
    run(tmp_path, settings(steps=2, ema=0.9))  # in the first step the host puts the images in order
    assert not counts[1]

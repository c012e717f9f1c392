"""What functions of viar can do nothing with: told by name, soon, and before PyTorch would."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SIDES, tiny_tokenizer, tiny_transformer

import viar
from viar.data import ImageFolder, TensorImages, augmented, save_grid
from viar.evaluation import FeatureNetwork, Features, features_of, read_reference
from viar.generation.choice import TokenNoise, choose
from viar.generation.series.series import generate_series
from viar.kinds import check_kind
from viar.tokenizer.reconstruction import psnr, ssim
from viar.training import reconstruction_loss

MODEL, CODEC = tiny_transformer(), tiny_tokenizer()
IMAGES = torch.zeros(2, 3, 6, 6)
EMPTY = torch.zeros(2, 3, 6, 0)
NOISE = TokenNoise.of_images(1, 0, 0, torch.device("cpu"))
NETWORK = FeatureNetwork("means", lambda images: Features(images.mean((2, 3))))


def _held(change: Callable[[torch.Tensor], Any]) -> Any:
    return viar.sample_tokens(MODEL, CODEC, [0], hold=lambda scale, f_hat: change(f_hat))


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ssim(EMPTY, EMPTY), ValueError, "images: expected pixels, got none"),
    (lambda: psnr(EMPTY, EMPTY), ValueError, "images: expected pixels, got none"),
    (
        lambda: reconstruction_loss(IMAGES, IMAGES + 0j),
        ValueError,
        "images, reconstruction: expected",
    ),
    (
        lambda: reconstruction_loss(IMAGES + 0j, IMAGES),
        ValueError,
        "images, reconstruction: expected",
    ),
    (lambda: choose(torch.zeros(()), NOISE, 0, 1, None), ValueError, r"floating-point \(B, l, V\)"),
    (
        lambda: choose(torch.zeros(1, 4), NOISE, 0, 1, None),
        ValueError,
        r"floating-point \(B, l, V\)",
    ),
    (lambda: viar.Sampling(cfg=torch.ones(2)), TypeError, "cfg: expected a number"),
    (lambda: viar.Sampling(top_p=np.ones((2, 2))), TypeError, "top_p: expected a number"),
    (lambda: viar.Sampling(cfg=10**400), ValueError, "cfg: expected a number that a float holds"),
    (lambda: viar.Sampling(cfg=1e308), ValueError, "cfg: expected a number from 0 to 1,000,000"),
    (lambda: viar.box_mask((0, 0, 1, 1), 10**12), ValueError, "side: expected 1 to 32,768 pixels"),
    (lambda: _held(lambda f_hat: f_hat.to("meta")), ValueError, "hold: expected a tensor on cpu back"),
    (lambda: _held(lambda f_hat: f_hat[:, :1]), ValueError, "hold: expected shape"),
    (
        lambda: viar.generate(MODEL, CODEC, [0], return_report=torch.ones(2)),
        TypeError,
        "return_report",
    ),
    (
        lambda: viar.sample_tokens(MODEL, CODEC, [0], measure="yes"),
        TypeError,
        "measure: expected",
    ),
    (
        lambda: viar.prepare_inference(MODEL, compile="yes"),
        ValueError,
        "compile: expected True, False",
    ),
    (lambda: viar.IterateCache(SIDES, [10**12] * len(SIDES)), ValueError, "iterations: expected at most"),
    (lambda: tiny_tokenizer(num_phi=10**9), ValueError, "num_phi must be at most 65536"),
    (
        lambda: tiny_tokenizer(num_residual_blocks=10**9),
        ValueError,
        "num_residual_blocks must be",
    ),
    (lambda: features_of(NETWORK, []), ValueError, "batches: expected at least one, got none"),
    (lambda: features_of(NETWORK, iter(())), ValueError, "batches: expected at least one, got none"),
    (lambda: read_reference("digits", NETWORK, -1), ValueError, "image_side: expected at least 1, got -1"),
    (lambda: ImageFolder([()], 6, train=False), TypeError, "files: expected"),
    (lambda: ImageFolder([(Path("a"), 0, 1)], 6, train=False), TypeError, "files: expected"),
    (lambda: check_kind("it: expected", (1, 2, 3), tuple[int, int]), TypeError, "it: expected"),
]


@pytest.mark.parametrize(("call", "kind", "words"), CASES, ids=range(len(CASES)))
def test_what_can_be_done_nothing_with_is_named(
    call: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    with torch.no_grad(), pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("formats", [Decimal("0.5"), "png", [], [["png"]], ["jpg"]])
def test_formats_of_a_series_are_some_of_two_words(formats: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="formats: expected"):
        generate_series(MODEL, CODEC, tmp_path / "out", num=1, formats=formats)


def test_no_pictures_make_no_grid_and_no_copies_are_fewer_than_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected at least one"):
        save_grid(IMAGES[:0], tmp_path / "a.png", columns=2)
    data = TensorImages(IMAGES, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="copies: expected at least 0, got -1"):
        augmented(data, -1)
    assert [len(part) for part in data.__getitems__([])] == [0, 0]
    assert not any(tmp_path.iterdir())

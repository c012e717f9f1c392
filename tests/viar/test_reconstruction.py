"""PSNR and SSIM against closed cases and SciPy's filters, and their means over held-out images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from tiny_models import tiny_tokenizer, uniform
from torch import Tensor

from viar.data import TensorImages
from viar.evaluation import psnr, ssim
from viar.training import tokenizer_validation


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of two (H, W) pictures of at least 11 pixels a side; windows that reach over the edge are cut off."""
    x, y = (x + 1) / 2, (y + 1) / 2

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((index / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("error", "expected"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0)])
def test_psnr_of_an_error_that_is_the_same_everywhere(error: float, expected: float) -> None:
    images = torch.full((2, 3, 4, 5), -1.0)
    torch.testing.assert_close(psnr(images, images + error), torch.full((2,), expected), atol=1e-3, rtol=0)


def test_an_image_that_is_met_exactly_has_no_noise_and_full_similarity() -> None:
    images = pictures(2, 3, 12, 12)
    assert psnr(images, images).tolist() == [math.inf] * 2
    assert ssim(images, images).tolist() == [1.0] * 2


def test_ssim_of_two_flat_images_compares_their_brightness_alone() -> None:
    bright, dark = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.5)
    expected = (2 * 0.75 * 0.25 + 0.01**2) / (0.75**2 + 0.25**2 + 0.01**2)  # of 0.75 and 0.25 in [0, 1]
    assert ssim(bright, dark).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_of_images_whose_structure_is_turned_round_is_negative() -> None:
    images = pictures(1, 1, 32, 32)
    assert ssim(images, -images).item() < -0.9


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(11, 24), st.integers(11, 24), st.integers(0, 99), st.floats(0, 1))
def test_ssim_is_that_of_filters_of_another_library(height: int, width: int, seed: int, mix: float) -> None:
    images = pictures(2, 2, height, width, seed=seed)
    other = torch.lerp(images, pictures(2, 2, height, width, seed=seed + 100), mix)
    pairs = zip(images.double().numpy(), other.double().numpy(), strict=True)
    expected = [np.mean([reference_ssim(a, b) for a, b in zip(x, y, strict=True)]) for x, y in pairs]
    np.testing.assert_allclose(ssim(images, other).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 10])
def test_ssim_of_images_smaller_than_its_window(side: int) -> None:
    images, other = pictures(3, 1, side, side), pictures(3, 1, side, side, seed=1)
    similarity = ssim(images, other)
    assert similarity.shape == (3,)
    assert (similarity.abs() <= 1).all()
    torch.testing.assert_close(similarity, ssim(other, images))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_of_different_shapes_are_refused(measure: object) -> None:
    with pytest.raises(ValueError, match=r"reconstruction must have the shape .* got \(1, 3, 4, 4\)"):
        measure(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))  # type: ignore[operator]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_validation_is_the_mean_over_images_whatever_the_batches(batch_size: int, training: bool) -> None:
    tokenizer = tiny_tokenizer().train(training)
    images = uniform(5, 3, 6, 6) * 2 - 1
    usage = tokenizer.quantizer.usage.clone()
    measured = tokenizer_validation(tokenizer, TensorImages(images, torch.zeros(5)), batch_size=batch_size)
    assert tokenizer.training is training
    assert tokenizer.quantizer.usage.equal(usage)
    made = tokenizer.decode(tokenizer.encode(images))
    assert measured == pytest.approx(
        {
            "loss": (images - made).square().mean().item(),
            "psnr": psnr(images, made).mean().item(),
            "ssim": ssim(images, made).mean().item(),
        },
        rel=1e-5,
    )


def test_validation_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="data: expected at least 1 image to reconstruct, got 0"):
        tokenizer_validation(tiny_tokenizer(), TensorImages(torch.zeros(0, 3, 6, 6), torch.zeros(0)))

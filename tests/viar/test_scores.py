"""What is measured of sets of images: closed forms of Gaussians, other programs' answers, laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from viar.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorisation,
    nearest_distances,
    precision_recall,
)
from viar.evaluation import scores as scores_module

SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor, count: int | None = 100) -> Moments:
    return Moments(count, mean.double(), covariance.double())


# Moments


@given(seed=SEEDS, cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_moments_of_batches_add_up_to_those_of_all(seed: int, cuts: list[int]) -> None:
    features = normal(sum(cuts), 5, seed=seed) * 3 + 1000  # far from 0, where sums of squares lose digits
    parts = [Moments.of(part) for part in features.split(cuts)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert total.count == len(features)
    np.testing.assert_allclose(total.mean, features.numpy().mean(0), rtol=1e-12)
    if len(features) > 1:
        np.testing.assert_allclose(total.covariance, np.cov(features.numpy().T), rtol=1e-8, atol=1e-8)


def test_moments_say_what_they_cannot_be_of() -> None:
    with pytest.raises(
        ValueError, match=r"features: expected shape \(N, F\) with N at least 1, got \(0, 3\)"
    ):
        Moments.of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        Moments.of(torch.tensor([[0.0], [math.nan]]))
    one, two = Moments.of(torch.zeros(1, 3)), Moments.of(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="features: expected equally many in both sets, got 3 and 4"):
        one + two
    with pytest.raises(ValueError, match="count: expected at least 2 samples in each set, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="count: expected numbers to weigh moments by, got None"):
        one + gaussian(torch.zeros(3), torch.eye(3), None)


NONE = {
    "mean: expected finite": (torch.full((3,), math.nan), torch.eye(3)),
    "covariance: expected finite": (torch.zeros(3), torch.eye(3) * math.inf),
    "mean, covariance: expected shapes .* got .3,. and .2, 2.": (torch.zeros(3), torch.eye(2)),
    "mean, covariance: expected shapes .* got .. and .3, 3.": (torch.tensor(0.0), torch.eye(3)),
    "mean: expected float64, got torch.complex64": (torch.zeros(3) * 1j, torch.eye(3)),
    "covariance: expected a symmetric matrix": (torch.zeros(3), torch.ones(3, 3).triu()),
    "covariance: expected variances of at least 0": (torch.zeros(3), -torch.eye(3)),
}


@pytest.mark.parametrize("message", NONE)
def test_what_no_samples_have_is_no_distance_of_0(message: str) -> None:
    mean, covariance = (value if value.is_complex() else value.double() for value in NONE[message])
    real = Moments.of(normal(9, 3))
    with pytest.raises(ValueError, match=message):
        frechet_distance(Moments(9, mean, covariance), real)


def test_covariances_that_were_written_in_less_digits_are_taken() -> None:
    """Those of fewer samples than features: float32 brings half of the variances a little below 0."""
    one = Moments.of(normal(20, 64))
    rounded = Moments(20, one.mean.float().double(), one.covariance.float().double())
    rounded.check_covariance()
    assert frechet_distance(one, rounded) == pytest.approx(0, abs=1e-4 * float(one.covariance.trace()))


def test_a_distance_that_is_no_number_is_not_0() -> None:
    wide = gaussian(torch.zeros(4), torch.eye(4, dtype=torch.float64) * 1e308)  # whose trace is infinite
    assert math.isnan(frechet_distance(wide, wide))


# Fréchet distance


@given(seed=SEEDS, size=st.integers(1, 12))
def test_the_distance_of_gaussians_that_commute_is_the_closed_form(seed: int, size: int) -> None:
    """In one basis it is the distance of means and of standard deviations."""
    basis = torch.linalg.qr(normal(size, size, seed=seed)).Q
    deviations = normal(2, size, seed=seed + 1).abs()
    means = normal(2, size, seed=seed + 2)
    a, b = (gaussian(m, basis * s.square() @ basis.T) for m, s in zip(means, deviations, strict=True))
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seed=SEEDS, size=st.integers(2, 12))
def test_the_distance_is_that_of_the_root_of_the_product(seed: int, size: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = Moments.of(normal(40, size, seed=seed)), Moments.of(normal(50, size, seed=seed + 1) * 2 + 1)
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    apart = (a.mean - b.mean).numpy()
    expected = apart @ apart + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize(("size", "count"), [(64, 20), (64, 500), (256, 50)])
def test_covariances_without_full_rank_keep_their_digits(size: int, count: int) -> None:
    """Of the same samples moved and stretched, the distance is known, however few they are."""
    samples = normal(count, size)
    one = Moments.of(samples)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * float(one.covariance.trace()))
    other = Moments.of(samples * 1.1 + 0.01)
    expected = float((one.mean - other.mean).square().sum() + 0.01 * one.covariance.trace())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_samples_of_gaussians_are_as_far_apart_as_the_gaussians() -> None:
    a, b = normal(20_000, 3, seed=1), normal(20_000, 3, seed=2) * 2 + 1
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(3 + 3, rel=0.03)


# Kernel distance


def test_the_kernel_distance_is_the_estimate_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the double sum as it is written, of sets of different sizes; blocks change nothing."""
    a, b = normal(23, 5, seed=1), normal(31, 5, seed=2) * 1.2 + 0.4

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if x is not y or i != j]
        return float(np.mean([(float(x[i] @ y[j]) / 5 + 1) ** 3 for i, j in pairs]))

    expected = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(scores_module, "BLOCK", 4)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(b.float(), a.float()) == pytest.approx(expected, rel=1e-4)


def test_sets_of_one_kind_have_a_kernel_distance_of_about_nothing() -> None:
    """Without bias it is 0 in the mean over draws."""
    distances = [kernel_distance(normal(30, 4, seed=k), normal(30, 4, seed=100 + k)) for k in range(100)]
    spread = float(np.std(distances)) / 10
    assert abs(float(np.mean(distances))) < 4 * spread
    assert min(distances) < 0


# Inception score


def test_the_inception_score_has_its_bounds() -> None:
    sure = torch.eye(8).repeat(4, 1)
    assert inception_score(sure) == pytest.approx(8)
    assert inception_score(torch.full((10, 8), 1 / 8)) == pytest.approx(1)
    assert inception_score(torch.eye(8)[:1].repeat(10, 1)) == pytest.approx(1)


def test_parts_of_the_inception_score_are_mixtures_whatever_the_order() -> None:
    """In parts cut as they come, images that stand class by class would have a score of 1."""
    sure = torch.eye(4).repeat_interleave(500, 0)
    assert inception_score(sure, split_size=200) == pytest.approx(4, rel=0.02)
    assert inception_score(sure, split_size=200, seed=1) != inception_score(sure, split_size=200)


def test_what_is_no_probability_has_no_inception_score() -> None:
    for wrong in (
        torch.randn(4, 3),
        torch.full((4, 3), 0.5),
        torch.zeros(0, 3),
        torch.full((2, 2), math.nan),
    ):
        with pytest.raises(ValueError, match="probabilities: expected"):
            inception_score(wrong)


# Another program


@pytest.mark.filterwarnings("ignore:Metric `:UserWarning")  # that it keeps all features
@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of one part, that it has none
def test_torchmetrics_finds_the_same_figures() -> None:
    theirs = [pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid", "inception")]
    a, b = normal(40, 6, seed=1), normal(40, 6, seed=2) * 1.5 + 0.3
    settings: dict[str, Any] = {"feature": _Itself(6)}
    fid = theirs[0].FrechetInceptionDistance(**settings)
    kid = theirs[1].KernelInceptionDistance(**settings, subsets=1, subset_size=40)
    inception = theirs[2].InceptionScore(**settings, splits=1)
    for metric in (fid, kid, inception):
        metric.set_dtype(torch.float64)
    for metric in (fid, kid):
        metric.update(a, real=True)
        metric.update(b, real=False)
    inception.update(a)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert kernel_distance(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-4)
    assert inception_score(a.softmax(1)) == pytest.approx(float(inception.compute()[0]), rel=1e-6)


# Precision and recall


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_shares_of_balls(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = normal(60, 4, seed=1), normal(45, 4, seed=2) * 0.6 + 0.5

    def among(samples: Tensor, others: Tensor) -> float:
        within = [sorted(float((x - y).norm()) for y in others)[k] for x in others]  # first is x itself
        hits = [any((x - y).norm() <= r for y, r in zip(others, within, strict=True)) for x in samples]
        return float(np.mean(hits))

    expected = among(generated, real), among(real, generated)
    assert precision_recall(real, generated, k) == pytest.approx(expected)
    monkeypatch.setattr(scores_module, "BLOCK", 7)
    assert precision_recall(real, generated, k) == pytest.approx(expected)


def test_precision_falls_with_strange_images_and_recall_with_missing_kinds() -> None:
    one, other = normal(50, 3, seed=1), normal(50, 3, seed=2) + 100
    both = torch.cat([one, other])
    assert precision_recall(both, both) == (1, 1)
    precision, recall = precision_recall(both, normal(50, 3, seed=3))
    assert precision > 0.8
    assert recall == pytest.approx(0.5, abs=0.1)
    precision, recall = precision_recall(one, both)
    assert (precision, recall) == (0.5, 1)


# What does not fit


@pytest.mark.parametrize("score", [kernel_distance, precision_recall])
def test_features_that_do_not_fit_are_refused(score: Any) -> None:
    with pytest.raises(ValueError, match="got 3 and 4; extract both with one network"):
        score(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"features: expected shape \(N, F\) with N at least"):
        score(torch.zeros(9, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"features: expected shape \(N, F\) with N at least"):
        score(torch.zeros(9, 3, 1), torch.zeros(9, 3))


# Memorisation


@given(seed=SEEDS, num=st.integers(0, 9), others=st.integers(1, 9))
def test_the_nearest_distance_is_the_least_of_all(seed: int, num: int, others: int) -> None:
    images, reference = (normal(n, 3, 4, 4, seed=seed + n).float() for n in (num, others))
    apart = [min(float((image - other).norm()) for other in reference) for image in images]
    np.testing.assert_allclose(nearest_distances(images, reference), apart, rtol=1e-5)


def test_a_copy_is_at_no_distance_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = normal(50, 3, 8, 8).float() + 5
    images = torch.cat([reference[17:37].flip(0), reference[:3] + 0.1])
    expected = torch.cat([torch.zeros(20), torch.full((3,), 0.1 * math.sqrt(3 * 8 * 8))])
    for block in (1024, 7):
        monkeypatch.setattr("viar.evaluation.copies.BLOCK", block)
        torch.testing.assert_close(nearest_distances(images, reference), expected, rtol=1e-4, atol=0)


def test_memorisation_is_1_of_what_is_new_and_0_of_copies() -> None:
    training, held_out, new = (normal(n, 3, 4, 4, seed=n).float() for n in (80, 60, 40))
    assert memorisation(training[:30], training, held_out) == 0
    assert memorisation(held_out, training, held_out) == 1
    assert memorisation(new, training, held_out) == pytest.approx(1, abs=0.1)
    assert memorisation(training[:30] + 0.01, training, held_out) < 0.1
    with pytest.raises(ValueError, match="half of them and more are there"):
        memorisation(new, training, training[:10])
    with pytest.raises(ValueError, match=r"reference: expected pictures of the images' shape \(3, 4, 4\)"):
        memorisation(new, training[..., :2], held_out)
    with pytest.raises(ValueError, match="images, held_out: expected at least one of each, got 0 and 60"):
        memorisation(new[:0], training, held_out)


class _Itself(torch.nn.Module):
    """Features that are what comes in."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features

"""Mean and covariance of features, and the Fréchet distance between two of them.

Two Gaussians are ||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) apart (Dowson and Landau, 1982); FID is
this distance of the features of two sets of images (Heusel et al., arXiv 1706.08500), sFID that of features
with their place in the image (Nash et al., arXiv 2103.03841). The trace of the root of the product is the sum
of the singular values of S_a^(1/2) S_b^(1/2): that needs no root of a matrix that is not symmetric, and stays
accurate where covariances have not full rank, as those of fewer images than features. `torchmetrics` takes
eigenvalues of the product itself, and no statistics from files.

Letters: F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kinds import check_kind, check_tensor, checked

ROUNDING = 1e-6  # of what is written in float32, relative


@dataclass(frozen=True)
class Moments:
    """Number, mean and covariance of samples; those of two batches add up to those of both together.

    Attributes:
        count: samples, at least 1, or `None` where a file does not tell.
        mean: (F,) float64.
        covariance: (F, F) float64, unbiased: divided by one less than the count. Of one sample it is 0.

    Raises:
        ValueError: another shape or type, numbers that are not finite, or a covariance that is not symmetric.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        """Validate what is quickly told; `check_covariance` tells the rest."""
        check_kind("count: expected", self.count, int | None)
        check_tensor("mean", self.mean)
        check_tensor("covariance", self.covariance)
        if self.mean.ndim != 1 or not len(self.mean) or self.covariance.shape != 2 * self.mean.shape:
            raise ValueError(
                "mean, covariance: expected shapes (F,) and (F, F), F at least 1, got "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            )
        for name, value in (("mean", self.mean), ("covariance", self.covariance)):
            if value.dtype != torch.float64:
                raise ValueError(f"{name}: expected float64, got {value.dtype}")
            check_tensor(name, value, has_numbers=True)
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got some that are not")
        apart = (self.covariance - self.covariance.T).abs().max()
        if apart > ROUNDING * self.covariance.abs().max():
            raise ValueError(
                f"covariance: expected a symmetric matrix, got numbers that are {apart:.3g} apart"
            )

    def check_covariance(self) -> None:
        """Raise `ValueError` where the covariance is none: where some direction has a variance below 0."""
        _check_variances(torch.linalg.eigvalsh(self.covariance))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of features (N, F), N at least 1.

        Raises:
            ValueError: another shape, no samples, or features that are not finite.
        """
        check_tensor("features", features, has_numbers=True)
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"features: expected shape (N, F) with N at least 1, got {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError(
                "features: expected finite numbers, got some that are not; are the images finite?"
            )
        features = features.double()
        mean = features.mean(0)
        apart = features - mean
        return cls(len(features), mean, apart.T @ apart / max(1, len(features) - 1))

    def __add__(self, other: Moments) -> Moments:
        """Those of both sets together (Chan, Golub and LeVeque, 1979).

        Raises:
            ValueError: different numbers of features, or an unknown count.
        """
        _check_alike(self, other)
        if self.count is None or other.count is None:
            raise ValueError(
                "count: expected numbers to weigh moments by, got None; compute them from images"
            )
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = (
            self.covariance * (self.count - 1)
            + other.covariance * (other.count - 1)
            + torch.outer(apart, apart) * (self.count * other.count / count)
        )
        return Moments(count, self.mean + apart * (other.count / count), scatter / (count - 1))


@checked
def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians with these moments, at least 0: FID, if they are Inception's.

    Args:
        a: of the one set, whose order has no influence.
        b: of the other.

    Raises:
        ValueError: different numbers of features, a set of fewer than 2 samples, which has no covariance, or
            a covariance with a variance below 0.
    """
    _check_alike(a, b)
    for moments in (a, b):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"count: expected at least 2 samples in each set, got {moments.count}")
    overlap = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return float(distance.clamp_min(0))


def _root(covariance: Tensor) -> Tensor:
    """Its symmetric root, without directions in which only rounding errors are left."""
    values, vectors = torch.linalg.eigh(covariance)
    _check_variances(values)
    rounding = torch.finfo(values.dtype).eps * len(values) * values[-1].clamp_min(0)
    root: Tensor = vectors * torch.where(values > rounding, values, 0).sqrt() @ vectors.T
    return root


def _check_variances(values: Tensor) -> None:
    """Raise `ValueError` where an eigenvalue, of those in rising order, is below 0 by more than rounding."""
    if values[0] < -ROUNDING * values.abs().sum():
        raise ValueError(
            f"covariance: expected variances of at least 0 in every direction, got {float(values[0]):.3g}"
        )


def _check_alike(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features: expected equally many in both sets, got {len(a.mean)} and {len(b.mean)}; "
            "extract both with one network"
        )

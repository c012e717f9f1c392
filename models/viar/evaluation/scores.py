"""How alike two sets of images are in their features: kernel distance, precision and recall; Inception score.

`torchmetrics` has the first and the last of them. They are written anew for what its classes force: they run
the network themselves, so once for every score; they shuffle by PyTorch's own generator, so one set of images
has many scores; their kernel distance wants as many images of the one set as of the other. The tests hold
these functions to it.

Letters: N, M images, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kinds import check_tensor, checked

BLOCK = 1024  # rows of a matrix of all pairs that are held at a time


@checked
@torch.no_grad()
def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets by the kernel (x y / F + 1)^3, without bias.

    That is the kernel Inception distance, KID (Bińkowski et al., arXiv 1801.01401), of all pairs of images
    rather than of random subsets. It is about 0 for sets of one kind, and below 0 by chance. The time grows
    with the square of the number of images.

    Args:
        a: (N, F), N at least 2.
        b: (M, F), M at least 2.

    Raises:
        ValueError: other shapes.
    """
    check_features(a, b, least=2)
    a, b = a.double(), b.double()
    return _mean_kernel(a, a, paired=True) + _mean_kernel(b, b, paired=True) - 2 * _mean_kernel(a, b)


def _mean_kernel(a: Tensor, b: Tensor, *, paired: bool = False) -> float:
    """Mean of the kernel over all pairs; `paired`: but those of a sample with itself."""
    total = 0.0
    for rows in torch.split(a, BLOCK):
        total += float((rows @ b.T / a.shape[1] + 1).pow(3).sum())
    if not paired:
        return total / (len(a) * len(b))
    total -= float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())
    return total / (len(a) * (len(a) - 1))


@checked
@torch.no_grad()
def inception_score(probabilities: Tensor, *, split_size: int = 5000, seed: int = 0) -> float:
    """exp of the mean of KL(p(class | image) || p(class)): 1 to C, higher for clear images of many classes.

    Salimans et al., arXiv 1606.03498. Images are shuffled and cut into parts of equal size, and the mean
    of the parts' scores is given, as is usual.

    Args:
        probabilities: (N, C) of each class, N at least 1.
        split_size: images of a part, about; the published figures are of 10 parts of 5,000. Fewer images are
            one part.
        seed: of the order.

    Raises:
        ValueError: another shape, or rows that are no probabilities.
    """
    check_tensor("probabilities", probabilities, has_numbers=True)
    if split_size < 1:
        raise ValueError(f"split_size: expected at least 1 image, got {split_size}")
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"probabilities: expected shape (N, C), got {tuple(probabilities.shape)}")
    probabilities = probabilities.double()
    if not (probabilities >= 0).all() or not (probabilities.sum(1) - 1).abs().max() < 1e-3:
        raise ValueError("probabilities: expected rows of at least 0 that sum to 1; give a softmax of logits")
    order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
    parts = probabilities[order.to(probabilities.device)].chunk(max(1, len(order) // split_size))
    return sum(_score(part) for part in parts) / len(parts)


def _score(probabilities: Tensor) -> float:
    entropy = torch.special.entr(probabilities).sum(1).mean()
    return float((torch.special.entr(probabilities.mean(0)).sum() - entropy).exp())


@checked
@torch.no_grad()
def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated images among the real ones, and of real images among the generated ones, 0 to 1.

    Kynkäänniemi et al., arXiv 1904.06991: an image is among a set if it is no farther from one of the
    set than that one is from its k-th neighbour in the set. Precision falls with images that are none of the
    kind, recall with kinds that are missing. The time grows with the square of the number of images.

    Args:
        real: features (N, F), N above k.
        generated: features (M, F), M above k.
        k: neighbours, at least 1.

    Returns:
        Precision and recall.

    Raises:
        ValueError: other shapes, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1 neighbour, got {k}")
    check_features(real, generated, least=k + 1)
    center = real.double().mean(0)  # Products of numbers near 0 leave more digits of a distance.
    real, generated = real.double() - center, generated.double() - center
    return _share_among(generated, real, k), _share_among(real, generated, k)


def _share_among(samples: Tensor, others: Tensor, k: int) -> float:
    """Share of `samples` that lie in the ball of one of `others`."""
    radii = torch.cat([distances.kthvalue(k + 1, 1).values for distances in _distances(others, others)])
    hits = sum(int((distances <= radii).any(1).sum()) for distances in _distances(samples, others))
    return hits / len(samples)


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Of rows of `a` to all of `b`, some rows at a time."""
    for rows in torch.split(a, BLOCK):
        yield torch.cdist(rows, b)


def check_features(a: Tensor, b: Tensor, *, least: int) -> None:
    """Raise `ValueError` unless both are features (N, F) of one F, of at least so many images."""
    for features in (a, b):
        check_tensor("features", features, has_numbers=True)
        if features.ndim != 2 or len(features) < least:
            raise ValueError(
                f"features: expected shape (N, F) with N at least {least}, got {tuple(features.shape)}; "
                "give more images"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features: expected equally many in both sets, got {a.shape[1]} and {b.shape[1]}; "
            "extract both with one network"
        )

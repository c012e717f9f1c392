"""Readouts that looped models leave their loop by.

With p the predictions of the state z, softmax of head(z), and q those of its image f(z):

- `OutputDifference`: ||head(f(z)) - head(z)|| <= rtol ||head(f(z))||
- `PredictionKL`: KL(q || p) <= threshold
- `PredictionEntropy`: H(p) <= threshold
- `StableArgMax`: the most likely class of p is that of q
- `HaltingScore`: sigmoid(head(z)) >= threshold

All but the first are exits of recurrent-depth models (Geiping et al. 2025, arXiv 2502.05171; for a score that
is learned Graves 2016, arXiv 1603.08983). They decide for every sample by itself, or for every place, as a
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import check_instance, check_number
from ..readout import Readout


@dataclass(frozen=True, kw_only=True)
class OutputDifference(Readout):
    """Done where the output hardly changes: ||head(f(z)) - head(z)|| <= rtol ||head(f(z))||.

    Args:
        head: see `Readout`.
        num_in_a_row: see `Readout`.
        rtol: relative tolerance.
        by_place: norms over the last axis alone, so that every place of the output answers by itself; default
            one norm a sample.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    rtol: float = 1e-2
    by_place: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_number("OutputDifference", 0, rtol=self.rtol)
        check_instance("OutputDifference", bool, "True or False", by_place=self.by_place)

    def is_done(
        self,
        reading: Tensor,  # (B, ...)
        following: Tensor | None,  # (B, ...)
    ) -> Tensor:
        """By norms."""
        assert following is not None
        reading, following = _wide(reading), _wide(following)
        if not self.by_place:
            reading, following = (output.reshape(len(output), -1) for output in (reading, following))
        scale = torch.linalg.vector_norm(following, dim=-1)
        done: Tensor = torch.linalg.vector_norm(following - reading, dim=-1) <= self.rtol * scale
        return done


@dataclass(frozen=True, kw_only=True)
class PredictionKL(Readout):
    """Done where the predictions hardly change: KL(q || p) <= threshold, from those of z to those of f(z).

    Args:
        head: see `Readout`; its last axis holds logits. One answer for each place on the others.
        num_in_a_row: see `Readout`.
        threshold: in nats.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    threshold: float = 5e-4

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_number("PredictionKL", 0, threshold=self.threshold)

    def is_done(
        self,
        reading: Tensor,  # (B, ..., classes)
        following: Tensor | None,  # (B, ..., classes)
    ) -> Tensor:
        """By the divergence."""
        assert following is not None
        before, after = _log_predictions(reading), _log_predictions(following)
        # A class that both rule out, by a logit of minus infinity, adds nothing.
        terms = torch.where(after == -torch.inf, 0, after.exp() * (after - before))
        return terms.sum(-1) <= self.threshold


@dataclass(frozen=True, kw_only=True)
class PredictionEntropy(Readout):
    """Done where the predictions of z are sure enough: H(p) <= threshold.

    Args:
        head: see `Readout`; its last axis holds logits. One answer for each place on the others.
        num_in_a_row: see `Readout`.
        threshold: in nats; log(classes) is the entropy of knowing nothing.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    threshold: float

    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_number("PredictionEntropy", 0, threshold=self.threshold)

    def is_done(
        self,
        reading: Tensor,  # (B, ..., classes)
        following: Tensor | None,
    ) -> Tensor:
        """By the entropy."""
        log = _log_predictions(reading)
        return -torch.where(log == -torch.inf, 0, log.exp() * log).sum(-1) <= self.threshold


@dataclass(frozen=True, kw_only=True)
class StableArgMax(Readout):
    """Done where the most likely class of f(z) is that of z, `num_in_a_row` times.

    Args:
        head: see `Readout`; its last axis holds logits. One answer for each place on the others.
        num_in_a_row: see `Readout`. Once may be chance, also early in a solve, where `Stopping.min_steps`
            helps too.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    num_in_a_row: int = 2

    def is_done(
        self,
        reading: Tensor,  # (B, ..., classes)
        following: Tensor | None,  # (B, ..., classes)
    ) -> Tensor:
        """By the classes."""
        assert following is not None
        # A reading that is not a number has a most likely class too.
        return (reading.argmax(-1) == following.argmax(-1)) & ~following.isnan().any(-1)


@dataclass(frozen=True, kw_only=True)
class HaltingScore(Readout):
    """Done where a score that was learned says so: sigmoid(head(z)) >= threshold.

    Args:
        head: see `Readout`; one logit a sample, (B,) or (B, 1), or one a place, (B, places...).
        num_in_a_row: see `Readout`.
        threshold: a probability.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    threshold: float = 0.5

    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_number("HaltingScore", 0, 1, threshold=self.threshold)

    def is_done(
        self,
        reading: Tensor,  # (B, ...)
        following: Tensor | None,
    ) -> Tensor:
        """By the score."""
        return _wide(reading).sigmoid() >= self.threshold


def _log_predictions(logits: Tensor) -> Tensor:
    return torch.log_softmax(_wide(logits), -1)


def _wide(reading: Tensor) -> Tensor:
    """In float32 at least: half precision has no digits left for differences of predictions."""
    return reading.to(torch.promote_types(reading.dtype, torch.float32))

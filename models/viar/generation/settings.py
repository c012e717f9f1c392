"""How to sample: what `generate`, `edit`, a series and the command line have in common."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from ..kinds import shown
from ..model.cache import check_cache_name
from ..model.schedule import Adaptive, Iterations, checked_iterations
from ..model.trunk import Trunk

LARGEST_CFG = 1e6  # beyond all use


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampler; validated when made, and by `schedule` against a model.

    `viar.generate` says more of each. The texts below are also the help of the command line's flags.

    Args:
        iterations: of the implicit block at each scale: an int, (first, last), a list, `Adaptive` or
            `Budget`; default the config's.
        warm_start: start each scale where the fixed point of the one before suggests
        guidance_reuse: last scales that reuse the guidance of the scale before them; an approximation
        cfg: guidance; 0 switches it off
        top_k: most likely tokens kept
        top_p: probability kept
        more_smooth: mixtures of codes instead of single ones; smoother pictures, not for metrics
        seed: of all that is drawn at random
        cache: of keys and values: at the fixed point, or one set an iteration, as published

    Raises:
        ValueError: a setting out of range; `seed` below 0; `cache` neither "equilibrium" nor "iterate".
    """

    iterations: Iterations | None = None
    warm_start: bool = False
    guidance_reuse: int = 0
    cfg: float = 1.5
    top_k: int | None = 900
    top_p: float | None = 0.96
    more_smooth: bool = False
    seed: int = 0
    cache: Literal["equilibrium", "iterate"] = "equilibrium"

    def __post_init__(self) -> None:
        """Validate what can be told without a model; numbers of NumPy become Python's."""
        put = partial(object.__setattr__, self)
        if self.iterations is not None:
            put("iterations", checked_iterations(self.iterations))
        put("cfg", _number("cfg", self.cfg))
        put("seed", check_index("seed", self.seed))
        put("guidance_reuse", _integer("guidance_reuse", self.guidance_reuse))
        if self.top_k is not None:
            put("top_k", _integer("top_k", self.top_k))
        if self.top_p is not None:
            put("top_p", _number("top_p", self.top_p))
        for name in ("warm_start", "more_smooth"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not 0 <= self.cfg <= LARGEST_CFG:
            raise ValueError(f"cfg: expected a number from 0 to {LARGEST_CFG:,.0f}, got {self.cfg}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, or None to keep all tokens, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p: expected a number in (0, 1], or None to keep all tokens, got {self.top_p}"
            )
        check_cache_name(self.cache)
        if self.guidance_reuse < 0 or (self.guidance_reuse and self.cfg == 0):
            raise ValueError(
                "guidance_reuse: expected at least 0, and guidance to reuse, got "
                f"{self.guidance_reuse} with cfg={self.cfg}"
            )

    def schedule(self, trunk: Trunk) -> list[int] | list[Adaptive] | list[None]:
        """Iterations of each scale of a model's trunk.

        Raises:
            ValueError, TypeError: a setting that does not apply to the trunk.
        """
        num_scales = len(trunk.sides)
        if self.guidance_reuse >= num_scales:
            raise ValueError(
                f"guidance_reuse: expected 0 to {num_scales - 1} of the {num_scales} scales, "
                f"got {self.guidance_reuse}"
            )
        return trunk.schedule(self.iterations, cache=self.cache, warm_start=self.warm_start)


def as_sampling(sampling: Sampling | None) -> Sampling:
    """`sampling`, by default `Sampling()`; raises `TypeError` for anything else."""
    if not (sampling is None or isinstance(sampling, Sampling)):
        raise TypeError(f"sampling: expected a viar.Sampling or None, got {sampling!r}")
    return Sampling() if sampling is None else sampling


def as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """`labels` as a tensor; what they may be only a model knows, see `NextScaleTransformer.check_labels`.

    Those that are none are on the CPU, whatever the default device: there they are read without waiting.

    Raises:
        TypeError: no numbers, or too large for a tensor.
    """
    if isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers, one an image, got {labels!r}") from error


def check_index(name: str, value: int) -> int:
    """`value` as a Python integer that can be half of the key of an image's random numbers.

    Args:
        name: of the argument, for the message.
        value: an integer, of NumPy or Python.

    Raises:
        TypeError: no integer.
        ValueError: not from 0 to 2^63 - 1.
    """
    number = _integer(name, value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}: expected an integer from 0 to 2**63 - 1, got {value}")
    return number


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})")
    try:
        return operator.index(value)
    except TypeError as error:  # a tensor or an array of several, or a class of integers
        raise TypeError(f"{name}: expected an integer, got {shown(value)}") from error


def _number(name: str, value: object) -> float:
    if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number that a float holds, got {shown(value)}") from error
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor or an array of several, or on no device
        raise TypeError(f"{name}: expected a number, got {shown(value)}") from error

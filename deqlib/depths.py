"""Random numbers of solver steps: what `StochasticJFB` draws the depth of a solve from.

Means are those of the number drawn: where a least number is given it is added to what is drawn above it, and
the mean stays what was asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor

from ._checks import check_generator, check_instance, check_integer, check_number, settle_numbers
from ._settings import Settings


class DepthDistribution(Settings, ABC):
    """Distribution of a number of solver steps. Subclasses are frozen dataclasses.

    Attributes:
        least: the smallest number that it gives.
    """

    least: int

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Independent numbers of steps, int64, of this shape, on the CPU.

        Args:
            shape: of what is drawn; `()` for one number.
            generator: draws them, on the CPU; `None` uses PyTorch's default generator.

        Raises:
            TypeError, ValueError: no shape or no generator.
        """

    def towards(self, end: Self, fraction: float) -> Self:
        """This distribution a fraction of the way to another, every parameter by itself and linearly.

        Numbers of steps are rounded.

        Args:
            end: of the same kind.
            fraction: in [0, 1].

        Raises:
            TypeError, ValueError: `fraction` is out of range, or `end` is of another kind, or has a bound
                that this one has not.
        """
        name = type(self).__name__
        check_number(f"{name}.towards", 0, 1, fraction=fraction)
        if type(end) is not type(self):
            raise TypeError(f"{name}.towards: end must be a {name} too, got {end!r}")
        made: dict[str, Any] = {}
        for parameter in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            a, b = getattr(self, parameter.name), getattr(end, parameter.name)
            if (a is None) != (b is None):
                raise ValueError(
                    f"{name}.towards: {parameter.name} must be given in both or in neither, got {self} and "
                    f"{end}"
                )
            if a is not None:
                between = a + fraction * (b - a)
                # Of a parameter that may be any number an int is one as good as another.
                is_number_of_steps = isinstance(a, int) and "float" not in str(parameter.type)
                made[parameter.name] = round(between) if is_number_of_steps else between
        return type(self)(**made)


Depth = int | tuple[int, int] | DepthDistribution  # a fixed number, least and most, or drawn


@dataclass(frozen=True)
class Uniform(DepthDistribution):
    """Every number of steps from `least` to `most` alike, both included.

    Args:
        least: at least 0.
        most: at least `least`.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_integer("Uniform", 0, least=self.least)
        check_integer("Uniform", self.least, most=self.most)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See `DepthDistribution`."""
        _check_draw(shape, generator)
        return torch.randint(self.least, self.most + 1, shape, generator=generator, device="cpu")


@dataclass(frozen=True)
class _Tailed(DepthDistribution):
    """A least number of steps and a random number more, without a most unless one is given."""

    mean: float
    least: int = field(default=0, kw_only=True)
    most: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        name = type(self).__name__
        check_integer(name, 0, least=self.least)
        check_number(name, self.least, mean=self.mean)
        if not math.isfinite(self.mean):
            raise ValueError(f"{name}: mean must be finite, got {self.mean}")
        if self.most is not None:
            check_integer(name, self.least, most=self.most)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """See `DepthDistribution`."""
        _check_draw(shape, generator)
        excess = torch.full(shape, self.mean - self.least, dtype=torch.float64, device="cpu")
        drawn = self._drawn(excess, generator).to(torch.int64) + self.least
        return drawn if self.most is None else drawn.clamp_max(self.most)

    @abstractmethod
    def _drawn(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Whole numbers of at least 0 with this mean, float64, one for each number in `mean`."""


@dataclass(frozen=True)
class Poisson(_Tailed):
    """`least` steps and a Poisson number more; its variance is `mean - least`.

    Args:
        mean: of the number of steps, at least `least`.
        least: fewest steps, default 0.
        most: larger numbers count as this one, which lowers the mean; default none.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    def _drawn(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(mean, generator=generator)


@dataclass(frozen=True)
class LogNormalPoisson(_Tailed):
    """`least` steps and a Poisson number more, whose rate is itself random, and log-normal.

    Mostly few steps and sometimes many: with m = `mean - least` the rate is m exp(sigma n - sigma^2 / 2), n
    normal, and the variance of the number of steps is m + m^2 (exp(sigma^2) - 1).
    (Recurrent depth, Geiping et al. 2025, arXiv 2502.05171, section 3.3: there one step is added to a Poisson
    number of mean r, which is `LogNormalPoisson(r + 1, least=1)`.)

    Args:
        mean: of the number of steps, at least `least`.
        sigma: standard deviation of the logarithm of the rate, default 0.5.
        least: fewest steps, default 0.
        most: larger numbers count as this one, which lowers the mean; default none.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    sigma: float = 0.5

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        check_number("LogNormalPoisson", 0, sigma=self.sigma)

    def _drawn(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        normal = torch.empty_like(mean).normal_(generator=generator)
        return torch.poisson(mean * torch.exp(self.sigma * normal - self.sigma**2 / 2), generator=generator)


@dataclass(frozen=True)
class Geometric(_Tailed):
    """`least` steps, and after each step another one with the same probability.

    With m = `mean - least` that probability is m / (m + 1) and the variance m (m + 1).

    Args:
        mean: of the number of steps, at least `least`.
        least: fewest steps, default 1.
        most: larger numbers count as this one, which lowers the mean; default none.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    least: int = field(default=1, kw_only=True)

    def _drawn(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        # By inversion: `Tensor.geometric_` refuses to be sure of the first step.
        uniform = 1 - torch.empty_like(mean).uniform_(generator=generator)  # in (0, 1]
        return torch.floor(uniform.log() / torch.log(mean / (mean + 1)))


def _check_draw(shape: Any, generator: Any) -> None:
    """Raise unless something can be drawn in this shape."""
    check_instance("draw", tuple, "a tuple of lengths", shape=shape)
    for i, length in enumerate(shape):
        check_integer("draw", 0, **{f"shape[{i}]": length})
    check_generator("draw", generator)


def check_depths(owner: str, least: int, **depths: Any) -> None:
    """Raise unless every value says how many steps to take, never fewer than `least`.

    Raises:
        TypeError, ValueError: see above.
    """
    for name, depth in depths.items():
        if isinstance(depth, DepthDistribution):
            if depth.least < least:
                raise ValueError(
                    f"{owner}: {name} must be at least {least} whatever is drawn, got {depth}, which gives "
                    f"{depth.least} at times; give it least={least}"
                )
        elif isinstance(depth, tuple):
            if len(depth) != 2:
                raise TypeError(f"{owner}: {name} must be a tuple (least, most), got {depth!r}")
            check_integer(owner, least, **{f"{name}[0]": depth[0], f"{name}[1]": depth[1]})
            if depth[0] > depth[1]:
                raise ValueError(f"{owner}: {name} must be (least, most), got {depth}")
        elif isinstance(depth, Integral):
            check_integer(owner, least, **{name: depth})
        else:
            raise TypeError(
                f"{owner}: {name} must be a tuple (least, most), an int, or a distribution such as "
                f"deqlib.Poisson(8), got {depth!r}"
            )


def draw(depth: Depth, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Independent numbers of steps, int64, of this shape, on the CPU; a fixed one draws nothing."""
    if isinstance(depth, int):
        return torch.full(shape, depth, dtype=torch.int64, device="cpu")
    distribution = Uniform(*depth) if isinstance(depth, tuple) else depth
    return distribution.draw(shape, generator)


def between(start: Depth, end: Depth, fraction: float) -> Depth:
    """A fraction of the way from one to the other.

    Raises:
        TypeError, ValueError: they are of different kinds, see `DepthDistribution.towards`.
    """
    if start == end:
        return start
    if isinstance(start, int) and isinstance(end, int):
        return round(start + fraction * (end - start))
    if isinstance(start, int) or isinstance(end, int):
        raise TypeError(
            f"towards: both must be fixed numbers of steps, or neither, got {start!r} and {end!r}"
        )
    one, other = (Uniform(*depth) if isinstance(depth, tuple) else depth for depth in (start, end))
    return one.towards(other, fraction)

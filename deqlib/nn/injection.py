"""Input injection that cannot become unstable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import check_integer, check_number, check_tensor, plain
from ._inputs import check_alike, check_input


class StableInjection(nn.Module):
    """z <- a z + (1 - a) inject(x), with a learned in (0, `max_decay`) for every channel.

    `z + inject(x)`, the usual way to feed the input to a cell, has a linear part of spectral radius 1, and a
    learned matrix in front of z may grow beyond it. Here the linear part is diagonal and stays below
    `max_decay < 1` whatever training does: a = max_decay * sigmoid(logit). Up to `max_decay` it is the
    zero-order-hold discretisation of dz/dt = inject(x) - z with a learned step softplus(-logit) a channel,
    as in diagonal state-space models (Gu & Dao 2023, arXiv 2312.00752). The gain 1 - a keeps the
    scale: the fixed point of the injection alone is inject(x), for every a.

    `inject` may hold the rest of the cell: `injection(z, block(z, x))` is a leaky step. Where the block is
    a contraction in the maximum norm, by a factor L < 1, so is the step, by max(a + (1 - a) L); in the
    Euclidean norm that is so if all channels share one a.

    Args:
        width: channels of the state.
        inject: module that maps the input to something of the state's shape; default
            `nn.Linear(width, width)`.
        decay: a at the start, in (0, max_decay).
        max_decay: least upper bound of a, in (0, 1).
        axis: of the channels in the state, `-1` for (..., C), `1` for (B, C, H, W).
    """

    def __init__(
        self,
        width: int,
        *,
        inject: nn.Module | None = None,
        decay: float = 0.5,
        max_decay: float = 0.99,
        axis: int = -1,
    ) -> None:
        super().__init__()
        check_integer("StableInjection", 1, width=width)
        check_number("StableInjection", 0, 1, open_minimum=True, decay=decay, max_decay=max_decay)
        if not decay < max_decay < 1:
            raise ValueError(
                "StableInjection: decay and max_decay must meet 0 < decay < max_decay < 1, "
                f"got {decay} and {max_decay}"
            )
        width, axis, max_decay = plain(width), plain(axis), plain(max_decay)
        if type(axis) is not int:
            raise TypeError(f"StableInjection: axis must be an int, got {axis!r}")
        share = decay / max_decay
        self.logit = nn.Parameter(torch.full((width,), math.log(share / (1 - share))))
        self.inject = nn.Linear(width, width) if inject is None else inject
        self.width, self.max_decay, self.axis = width, max_decay, axis

    @property
    def decay(self) -> Tensor:
        """a, shape (width,)."""
        return self.max_decay * torch.sigmoid(self.logit)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """The next state, of the shape of `z`.

        Raises:
            TypeError: the state is none.
            ValueError: the state has no such channels, or the input does not go with it.
        """
        check_tensor("StableInjection", state=z)
        if not z.is_floating_point():
            raise TypeError(f"StableInjection: the state must be floating point, got {z.dtype}")
        if not -z.dim() <= self.axis < z.dim() or z.shape[self.axis] != self.width:
            raise ValueError(
                f"StableInjection: expected a state with {self.width} channels along axis {self.axis}, "
                f"got one of shape {tuple(z.shape)}"
            )
        shape = [1] * z.dim()
        shape[self.axis] = self.width
        if type(self.inject) is nn.Linear:  # else the caller's, who knows what it takes
            check_input("StableInjection", x, self.inject.in_features, self.inject.weight)
        injected = self.inject(x)
        check_alike("StableInjection", z, injected)
        return torch.lerp(injected.to(z.dtype), z, self.decay.to(z.dtype).view(shape))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"width={self.width}, max_decay={self.max_decay}, axis={self.axis}"

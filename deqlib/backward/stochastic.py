"""Stochastic Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._checks import check_instance, check_integer, settle_numbers
from ..solution import Solution
from ..state import FlatMap
from ..stopping import Stopping
from .base import Backward, Solve
from .checkpointing import Checkpointed
from .tape import first_order_only, solve_off_tape


@dataclass(frozen=True, kw_only=True)
class StochasticJFB(Backward):
    """A random number of steps without gradient, then a random number with.

    Trains a layer whose quality does not depend on the number of steps. Where autograd records, the
    solver takes a steps under `no_grad` and b steps on the tape, a and b uniform on the closed ranges
    given, and the value is the last iterate (the stopping rule then has no say: there is no tolerance to
    meet). Elsewhere the solve follows the layer's stopping rule.
    (Fixed-point diffusion, Bai & Melas-Kyriazi 2024, arXiv 2401.08741; VIAR, arXiv 2605.01220.)

    A solver with a history starts it anew on the tape. Activation checkpointing around the layer would
    evaluate it twice at different depths: seed the generator inside the checkpointed function.

    The gradient is the unrolled one cut after b steps. Memory: b evaluations. Cost: a + b evaluations
    and b vector-Jacobian products.

    Args:
        no_grad: least and most steps without gradient.
        grad: least and most steps with gradient, at least 1.
        generator: draws a and b, on the CPU; `None` uses PyTorch's default generator. Processes that
            train one model together must draw the same: give each a generator of the same seed.
        checkpoint: keep of each of the b evaluations only the state that it was made at, and evaluate
            again in the backward pass, as `Unroll(checkpoint=True)` does. Same gradient; memory: b states
            and one evaluation; cost: b evaluations more. Default `False`.

    Raises:
        TypeError, ValueError: a setting out of range, or a generator that is not on the CPU.
    """

    no_grad: tuple[int, int] = (0, 10)
    grad: tuple[int, int] = (1, 12)
    generator: torch.Generator | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_instance("StochasticJFB", bool, "True or False", checkpoint=self.checkpoint)
        for name, minimum, pair in (("no_grad", 0, self.no_grad), ("grad", 1, self.grad)):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"StochasticJFB: {name} must be a tuple (least, most), got {pair!r}")
            check_integer("StochasticJFB", minimum, **{f"{name}[0]": pair[0], f"{name}[1]": pair[1]})
            if pair[0] > pair[1]:
                raise ValueError(f"StochasticJFB: {name} must be (least, most), got {pair}")
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise TypeError(
                f"StochasticJFB: generator must be a torch.Generator or None, got {self.generator!r}"
            )
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"StochasticJFB: generator must be on the CPU, got {self.generator.device}; "
                "drawing on a device would wait for it at every step"
            )

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Steps off the tape, then steps on it; a plain solve where autograd does not record."""
        if not torch.is_grad_enabled():
            return solve(f, z0)
        free, taped = self._draw(self.no_grad), self._draw(self.grad)
        start = solve_off_tape(f, z0, solve, stopping=Stopping.steps(free)).value
        if self.checkpoint:
            f = replace(f, cell=Checkpointed(f.cell, "StochasticJFB"))
        solution = solve(f, start, stopping=Stopping.steps(taped))
        return replace(
            solution,
            value=first_order_only(solution.value),
            num_steps=solution.num_steps + free,
            nfe=solution.nfe + free,
        )

    def _draw(self, bounds: tuple[int, int]) -> int:
        low, high = bounds
        return int(torch.randint(low, high + 1, (), generator=self.generator, device="cpu"))

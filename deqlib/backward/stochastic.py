"""Stochastic Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .._checks import check_choice, check_instance, check_number, settle_numbers
from ..depths import Depth, between, check_depths, draw
from ..solution import Solution
from ..state import FlatMap
from ..steps import Course
from .base import Backward, Solve
from .checkpointing import Checkpointed
from .tape import first_order_only, solve_off_tape


@dataclass(frozen=True, kw_only=True)
class StochasticJFB(Backward):
    """A random number of steps without gradient, then a random number with.

    Trains a layer whose quality does not depend on the number of steps. Where autograd records, the
    solver takes a steps under `no_grad` and b steps on the tape, a and b as drawn from `no_grad` and `grad`,
    and the value is the last iterate (the stopping rule then has no say: there is no tolerance to meet).
    Elsewhere the solve follows the layer's stopping rule.
    (Fixed-point diffusion, Bai & Melas-Kyriazi 2024, arXiv 2401.08741; VIAR, arXiv 2605.01220.)

    With `total` that many steps are taken in all, the last b of them on the tape, or all if they are fewer:
    `StochasticJFB(total=LogNormalPoisson(32, least=1), grad=8)` as in recurrent-depth language models
    (Geiping et al. 2025, arXiv 2502.05171), `StochasticJFB(total=n, grad=1)` for n - 1 steps without gradient
    and 1 with.

    A solver with a history starts it anew on the tape. Activation checkpointing around the layer would
    evaluate it twice at different depths: seed the generator inside the checkpointed function.

    The gradient is the unrolled one cut after b steps. Memory: b evaluations. Cost: a + b evaluations
    and b vector-Jacobian products; of samples that draw for themselves the largest a and b count.

    Args:
        no_grad: steps without gradient: a fixed number, a tuple (least, most), all numbers from one to the
            other alike, or a distribution such as `deqlib.Poisson`.
        grad: steps with gradient, likewise, at least 1.
        total: steps in all, likewise, at least 1, in place of `no_grad`; default `None`.
        per: "batch", one draw for all samples, the default; or "sample": every sample draws its own numbers,
            and stands still when it has taken its steps: first until all have taken theirs without
            gradient, then until all have taken theirs with. Its value and gradient are those that it would
            have alone. It is evaluated with the others all the same.
        generator: draws, on the CPU; `None` uses PyTorch's default generator. It moves on alike whatever the
            number of samples. Processes that train one model together must draw the same: give each a
            generator of the same seed, and with `per="sample"` batches of one size.
        checkpoint: keep of each of the b evaluations only the state that it was made at, and evaluate
            again in the backward pass, as `Unroll(checkpoint=True)` does. Same gradient; memory: b states
            and one evaluation; cost: b evaluations more. Default `False`.

    Raises:
        TypeError, ValueError: a setting out of range, `no_grad` beside `total`, or a generator that is not on
            the CPU.
    """

    no_grad: Depth = (0, 10)
    grad: Depth = (1, 12)
    total: Depth | None = None
    per: Literal["batch", "sample"] = "batch"
    generator: torch.Generator | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_instance("StochasticJFB", bool, "True or False", checkpoint=self.checkpoint)
        check_choice("StochasticJFB", ("batch", "sample"), per=self.per)
        check_depths("StochasticJFB", 0, no_grad=self.no_grad)
        check_depths("StochasticJFB", 1, grad=self.grad)
        if self.total is not None:
            check_depths("StochasticJFB", 1, total=self.total)
            if self.no_grad != type(self).no_grad:
                raise ValueError(
                    f"StochasticJFB: no_grad={self.no_grad} has no effect beside total={self.total}: without "
                    "gradient are the steps that grad leaves; give one of the two"
                )
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise TypeError(
                f"StochasticJFB: generator must be a torch.Generator or None, got {self.generator!r}"
            )
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"StochasticJFB: generator must be on the CPU, got {self.generator.device}; "
                "drawing on a device would wait for it at every step"
            )

    @property
    def may_change_by_step(self) -> bool:
        """See `Backward`."""
        return True

    def towards(self, end: StochasticJFB, fraction: float) -> StochasticJFB:
        """This mode with depths a fraction of the way to those of another: a curriculum.

        `layer.backward = start.towards(end, step / num_steps)` in a training loop. Every parameter moves by
        itself and linearly, numbers of steps are rounded; the rest is this mode's.

        Args:
            end: with depths of the same kinds.
            fraction: in [0, 1].

        Raises:
            TypeError, ValueError: `fraction` is out of range, or depths are of different kinds.
        """
        check_number("StochasticJFB.towards", 0, 1, fraction=fraction)
        check_instance("StochasticJFB.towards", StochasticJFB, "a deqlib.StochasticJFB", end=end)
        if (self.total is None) != (end.total is None):
            raise ValueError(
                f"StochasticJFB.towards: both must have total, or both no_grad, got {self} and {end}"
            )
        total = None
        if self.total is not None and end.total is not None:
            total = between(self.total, end.total, fraction)
        return replace(
            self,
            no_grad=between(self.no_grad, end.no_grad, fraction),
            grad=between(self.grad, end.grad, fraction),
            total=total,
        )

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Steps off the tape, then steps on it; a plain solve where autograd does not record."""
        if not torch.is_grad_enabled():
            return solve(f, z0)
        free, taped = self._courses(len(z0))
        off = solve_off_tape(f, z0, solve, course=free)
        if self.checkpoint:
            f = replace(f, cell=Checkpointed(f.cell, "StochasticJFB"))
        solution = solve(f, off.value, course=taped)
        return replace(
            solution,
            value=first_order_only(solution.value),
            num_steps=solution.num_steps + off.num_steps,
            nfe=solution.nfe + off.nfe,
            sample_nfe=solution.sample_nfe + off.sample_nfe,
        )

    def _courses(self, batch: int) -> tuple[Course, Course]:
        """The steps without gradient, and those with."""
        if self.per == "batch":
            a, b = self._drawn_once()
            return Course(a, before=0, total=a + b), Course(b, before=a, total=a + b)
        free, taped = self._drawn_for_each(batch)
        total = [a + b for a, b in zip(free, taped, strict=True)]
        return Course(free, before=0, total=total), Course(taped, before=free, total=total)

    def _drawn_once(self) -> tuple[int, int]:
        """Steps without and with gradient."""
        if self.total is None:
            return self._draw(self.no_grad), self._draw(self.grad)
        total = self._draw(self.total)
        taped = min(total, self._draw(self.grad))
        return total - taped, taped

    def _draw(self, depth: Depth) -> int:
        return int(draw(depth, (), self.generator))

    def _drawn_for_each(self, batch: int) -> tuple[list[int], list[int]]:
        """Steps without and with gradient of each sample, by a generator that one draw of ours seeds.

        Else processes whose batches were once of different sizes would not draw alike any more.
        """
        seed = torch.randint(2**62, (), generator=self.generator, device="cpu")
        generator = torch.Generator().manual_seed(int(seed))
        first = draw(self.no_grad if self.total is None else self.total, (batch,), generator).tolist()
        grad = draw(self.grad, (batch,), generator).tolist()
        if self.total is None:
            return first, grad
        taped = [min(pair) for pair in zip(first, grad, strict=True)]
        return [total - b for total, b in zip(first, taped, strict=True)], taped

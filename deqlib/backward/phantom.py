"""Phantom gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._checks import check_choice, check_integer, check_number, settle_numbers
from ..solution import Solution
from ..state import FlatMap
from .base import Backward, Solve
from .graph import VectorJacobianProduct
from .tape import attach, on_tape, solve_off_tape, solve_unconfirmed, straight_through


@dataclass(frozen=True, kw_only=True)
class PhantomGradient(Backward):
    """A few damped steps from the fixed point stand in for the implicit gradient.

    With k = `steps` and beta = `damping`, `form="unroll"` puts z <- (1 - beta) z + beta f(z) on the tape
    k times; `form="neumann"` keeps one evaluation and sums u = beta sum_{i<k} (beta J^T + (1 - beta) I)^i g.
    At an exact fixed point both give the same gradient for everything f depends on. The error is of
    order ||beta J + (1 - beta) I||^k. Memory: k evaluations, or one. Cost: k evaluations and products, or
    one evaluation and k products. `steps=1, damping=1` is `JFB`.
    (Geng et al. 2021, arXiv 2111.05177, equations 8 and 10.)

    Args:
        steps: k, at least 1.
        damping: beta, in (0, 1].
        form: "unroll" or "neumann".

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    steps: int = 5
    damping: float = 0.5
    form: Literal["unroll", "neumann"] = "unroll"

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_integer("PhantomGradient", 1, steps=self.steps)
        check_number("PhantomGradient", 0, 1, open_minimum=True, damping=self.damping)
        check_choice("PhantomGradient", ("unroll", "neumann"), form=self.form)

    @property
    def is_traceable(self) -> bool:
        """See `Backward`."""
        return self.form == "unroll"

    def apply(self, f: FlatMap, z0: Tensor, solve: Solve) -> Solution:
        """Solve off the tape, then take the steps on it or sum the series in the backward pass."""
        if not torch.is_grad_enabled():
            return solve_off_tape(f, z0, solve)
        solution, confirm = solve_unconfirmed(f, z0, solve)
        if self.form == "neumann":
            source, output = on_tape(f, solution.value)
            return attach(confirm(output), output, self._neumann, source, nfe=1)
        output = solution.value
        for step in range(self.steps):
            image = f(output)
            solution = solution if step else confirm(image)
            output = torch.lerp(output, image, self.damping)
        return straight_through(solution, output, nfe=self.steps)

    def _neumann(self, g: Tensor, vjp: VectorJacobianProduct) -> Tensor:
        term = total = g
        for _ in range(self.steps - 1):
            term = torch.lerp(term, vjp(term), self.damping)
            total = total + term
        return self.damping * total

"""The maps that solvers are measured on: problems of `deqlib.testing` by name, and what they lack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deqlib import Solution, Solver, Stopping, fixed_point
from deqlib.testing import Problem, suite

NAMES = (
    "linear 0.9",
    "linear 0.99",
    "linear, non-normal",
    "nearly singular",
    "expanding",
    "tanh RNN",
    "monotone operator",
    "MLP 32x64x256",
    "MLP 8x256x512",
    "mixer",
    "transformer",
    "transformer, hard",
    "convolution",
)
# Those and one whose solution is not known, for what only solves.
SOLVED = (*NAMES, "attention")
QUICK = ("linear 0.9", "expanding", "mixer", "transformer, hard")
MAX_EVALUATIONS = 301


@cache
def by_name() -> dict[str, Problem]:
    """Those of `deqlib.testing.suite()`, and the attention cell; drawing them takes a second."""
    return {problem.name: problem for problem in (*suite(), attention())}


def attention(*, batch: int = 8, tokens: int = 128, width: int = 128, seed: int = 1) -> Problem:
    """f(z) = LayerNorm(x + 2 attention(z)), weights 1.2 times PyTorch's: Picard does not converge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer, norm = nn.MultiheadAttention(width, 4, batch_first=True), nn.LayerNorm(width)
        with torch.no_grad():
            for weight in layer.parameters():
                if weight.dim() == 2:
                    weight.mul_(1.2)
        x = torch.randn(batch, tokens, width)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    parameters = dict(layer.named_parameters())
    weights = tuple(parameters[name].detach() for name in names)
    return Problem("attention", _AttentionCell(norm.eps), torch.zeros_like(x), (x, *weights), None)


@dataclass(frozen=True)
class _AttentionCell:
    """The cell with its weights as inputs, so that they go where the problem goes."""

    eps: float
    heads: int = 4

    def __call__(
        self, z: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
    ) -> Tensor:
        batch, tokens, width = z.shape
        q, k, v = (
            nn.functional.linear(z, w_in, b_in).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return nn.functional.layer_norm(
            x + 2 * nn.functional.linear(mixed, w_out, b_out), (width,), eps=self.eps
        )


def elementwise(z: Tensor, x: Tensor, rates: Tensor) -> Tensor:
    """x + rates z: it allocates its output and nothing else, so that what is measured is the solver."""
    return torch.addcmul(x, z, rates)


def solve(problem: Problem, solver: Solver, stopping: Stopping, **settings: Any) -> Solution:
    """By `deqlib.fixed_point`, with more of its settings; whoever asks judges whether it arrived."""
    return fixed_point(
        problem.cell,
        problem.z0,
        problem.inputs,
        solver=solver,
        stopping=stopping,
        on_failure="ignore",
        **settings,
    )


def named(name: str, device: torch.device) -> Problem:
    """The problem of this name, its tensors on the device."""
    return by_name()[name].to(device=device)

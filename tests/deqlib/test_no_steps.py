"""Modes that differentiate the iteration, where no step is taken: a start at the solution, an empty batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TIGHT, Cell
from torch import Tensor

from deqlib import (
    ImplicitDifferentiation,
    ImplicitLayer,
    Reversible,
    ReversiblePicard,
    Stopping,
    Unroll,
)

EXACT = Stopping(rtol=TIGHT, max_steps=300, patience=None)


def assert_same(ours: Any, expected: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def exact(cell: Callable[..., Tensor], x: Tensor) -> Tensor:
    backward = ImplicitDifferentiation(stopping=EXACT)
    value: Tensor = ImplicitLayer(cell, stopping=EXACT, backward=backward, on_failure="ignore")(x)
    return value


def make() -> tuple[Cell, Tensor, Tensor]:
    """A cell, its input, and its fixed point."""
    torch.manual_seed(0)
    cell, x = Cell(4).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return cell, x, exact(cell, x).detach()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_unrolling_from_the_solution_has_the_gradient_of_one_step(checkpointed: bool) -> None:
    cell, x, z0 = make()
    z0[1] = 0  # this sample takes steps
    backward = Unroll(checkpoint=checkpointed)
    for on in (torch.enable_grad, torch.no_grad):
        with on():
            found = ImplicitLayer(cell, backward=backward, stopping=Stopping(rtol=1e-6)).solve(x, z0=z0)
            assert torch.equal(found.value[0], z0[0])
            assert found.num_steps.tolist()[0] == 0 < found.num_steps.tolist()[1]
    found = ImplicitLayer(cell, backward=backward, stopping=Stopping(rtol=1e-6)).solve(x, z0=z0)
    ours = torch.autograd.grad(found.value[0].sin().sum(), [x, *cell.parameters()], retain_graph=True)
    one_step = cell(z0[:1], x[:1]) - cell(z0[:1], x[:1]).detach() + z0[:1]
    assert_same(ours, torch.autograd.grad(one_step.sin().sum(), [x, *cell.parameters()]))
    others = torch.autograd.grad(found.value[1].sin().sum(), [x, *cell.parameters()])
    assert_same(others, torch.autograd.grad(exact(cell, x)[1].sin().sum(), [x, *cell.parameters()]), 1e-3)


@pytest.mark.parametrize("start", ["empty", "at the solution"])
@pytest.mark.parametrize("name", ["unroll", "reversible", "implicit"])
def test_a_backward_pass_of_no_steps_reaches_everything(name: str, start: str) -> None:
    cell, x, z0 = make()
    if start == "empty":
        x, z0 = x.detach()[:0].requires_grad_(), z0[:0]
    modes: dict[str, dict[str, Any]] = {
        "unroll": {"backward": Unroll()},
        "reversible": {"backward": Reversible(), "solver": ReversiblePicard()},
        "implicit": {},
    }
    value = ImplicitLayer(cell, **modes[name], stopping=Stopping(rtol=1e-6)).solve(x, z0=z0).value
    value.sum().backward()
    for tensor in (x, *cell.parameters()):
        assert tensor.grad is not None
        assert bool(tensor.grad.any()) == (start != "empty")

"""Deep supervision: solves that begin where the one before ended, each with a gradient of its own."""

from __future__ import annotations

import pytest
import torch
from problems import problem
from torch import Tensor, nn

from deqlib import JFB, ImplicitLayer, Picard, Stopping, Unroll, deep_supervision

STEPS = Stopping.steps(3)


class Cell(nn.Module):
    """z -> tanh(W z + x)."""

    def __init__(self) -> None:
        super().__init__()
        _, weight = problem("tanh", dim=4).inputs
        self.weight = nn.Parameter(weight.clone())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


def inputs() -> Tensor:
    return problem("tanh", dim=4).inputs[0]


def test_losses_and_gradients_are_those_of_a_loop_by_hand() -> None:
    layer, by_hand, x = (
        ImplicitLayer(Cell(), solver=Picard(), stopping=STEPS, backward=Unroll()),
        Cell(),
        inputs(),
    )
    z = torch.zeros_like(x)
    for solution in deep_supervision(layer, x, num_solves=4):
        z = z.detach()
        for _ in range(3):
            z = by_hand(z, x)
        torch.testing.assert_close(solution.value, z)
        for value, cell in ((solution.value, layer.cell), (z, by_hand)):
            (gradient,) = torch.autograd.grad(value.square().sum(), cell.weight)
            with torch.no_grad():
                cell.weight -= 0.1 * gradient
        torch.testing.assert_close(layer.cell.weight, by_hand.weight)


def test_solves_add_up_to_one_long_solve() -> None:
    layer, x = ImplicitLayer(Cell(), solver=Picard(), stopping=STEPS, backward=JFB()), inputs()
    *_, last = deep_supervision(layer, x, num_solves=5)
    torch.testing.assert_close(last.value, layer.solve(x, stopping=Stopping.steps(15)).value)


def test_a_solve_begins_when_the_one_before_was_dealt_with() -> None:
    layer, x = ImplicitLayer(Cell(), solver=Picard(), stopping=STEPS), inputs()
    solves = deep_supervision(layer, x, num_solves=2)
    next(solves)
    with torch.no_grad():
        layer.cell.weight.zero_()
    torch.testing.assert_close(next(solves).value, torch.tanh(x))
    with pytest.raises(StopIteration):
        next(solves)


def test_a_loop_goes_on_from_a_state_and_settings_are_those_of_a_solve() -> None:
    layer, x = ImplicitLayer(Cell(), solver=Picard()), inputs()
    exact = layer.solve(x, stopping=Stopping(rtol=1e-12, max_steps=200)).value.detach()
    (found,) = deep_supervision(layer, x, num_solves=1, z0=exact, stopping=STEPS, backward=JFB())
    torch.testing.assert_close(found.value, exact, rtol=1e-9, atol=1e-9)
    assert found.nfe == 4


@pytest.mark.parametrize(("num_solves", "error"), [(0, ValueError), (1.5, TypeError)])
def test_a_number_of_solves_that_is_none_is_refused_at_once(num_solves: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="deep_supervision: num_solves"):
        deep_supervision(ImplicitLayer(Cell()), inputs(), num_solves=num_solves)
    with pytest.raises(TypeError, match=r"layer must be a deqlib\.ImplicitLayer"):
        deep_supervision(Cell(), inputs(), num_solves=1)

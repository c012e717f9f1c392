from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import (
    Backward,
    ImplicitDifferentiation,
    ImplicitLayer,
    Picard,
    Reversible,
    ReversiblePicard,
    Solver,
    Stopping,
    Unroll,
)
from deqlib.nn import MonotoneCell
from deqlib.testing import CellConformance

TIGHT = Stopping(rtol=1e-12, max_steps=5000)
WIDTH = 6


def made(margin: float, gain: float, seed: int) -> MonotoneCell:
    """A cell with weights `gain` times as large as at the start."""
    torch.manual_seed(seed)
    cell = MonotoneCell(WIDTH, margin=margin).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter *= gain
    return cell


def weight_of(cell: MonotoneCell) -> Tensor:
    """W, from its definition."""
    a, b = cell.symmetric, cell.skew
    return torch.eye(WIDTH, dtype=a.dtype) * (1 - cell.margin) - a @ a.T + b - b.T


def inputs(batch: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, WIDTH, dtype=torch.float64, generator=generator)


def tight(cell: nn.Module) -> nn.Module:
    layer = ImplicitLayer(
        cell,
        solver=Picard(),
        stopping=TIGHT,
        backward=ImplicitDifferentiation(solver=Picard(), stopping=TIGHT),
        on_failure="raise",
    )
    return nn.Sequential(layer, nn.ReLU())


cells = given(
    margin=st.floats(0.1, 3), gain=st.floats(0, 4), seed=st.integers(0, 2**16), more=st.floats(0.1, 30)
)


class TestConformance(CellConformance):
    contraction = 1.0

    @property
    def cell(self) -> nn.Module:
        return made(1.0, 2.0, 0).float()

    def make_inputs(
        self, batch: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor]]:
        x = torch.randn(batch, WIDTH, dtype=dtype, generator=generator)
        return torch.zeros_like(x), (x,)


@cells
def test_the_plain_iteration_solves_the_equation_whatever_the_weights(
    margin: float, gain: float, seed: int, more: float
) -> None:
    cell, x = made(margin, gain, seed), inputs(seed=seed)
    with torch.no_grad():
        z = tight(cell)(x)
        torch.testing.assert_close(z, torch.relu(z @ weight_of(cell) + x), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(cell.weight, weight_of(cell))


@cells
def test_what_is_to_be_monotone_is_so_by_the_margin(
    margin: float, gain: float, seed: int, more: float
) -> None:
    excess = torch.eye(WIDTH) - made(margin, gain, seed).weight.detach()
    assert torch.linalg.eigvalsh((excess + excess.T) / 2).min() >= margin * (1 - 1e-9) - 1e-9


@cells
def test_a_step_contracts_by_no_less_than_is_promised(
    margin: float, gain: float, seed: int, more: float
) -> None:
    cell = made(margin, gain, seed)
    with torch.no_grad():
        x, first, second = inputs(seed=seed), more * inputs(seed=seed + 1), inputs(seed=seed + 2)
        factor = (cell(first, x) - cell(second, x)).norm(dim=1) / (first - second).norm(dim=1)
        norm = torch.linalg.matrix_norm(torch.eye(WIDTH) - weight_of(cell), 2)
        bound = 1.5 * norm  # width^(1/16) is less than that
        assert (factor <= ((bound - margin) / (bound + margin)).sqrt()).all()
        step, _ = cell._resolvent()
        assert norm <= (1 + 1e-9) / step <= bound


@cells
def test_the_fixed_point_moves_no_more_than_the_input_over_the_margin(
    margin: float, gain: float, seed: int, more: float
) -> None:
    layer, x = tight(made(margin, gain, seed)), inputs(seed=seed)
    with torch.no_grad():
        y = x + more * inputs(seed=seed + 1)
        moved = (layer(x) - layer(y)).norm(dim=1)
        assert (moved <= (1 + 1e-6) * (x - y).norm(dim=1) / margin).all()


@given(margin=st.floats(0.3, 3), gain=st.floats(0.1, 3), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_the_equation(margin: float, gain: float, seed: int) -> None:
    cell, x = made(margin, gain, seed), inputs(seed=seed).requires_grad_()
    z = tight(cell)(x)
    g = inputs(seed=seed + 1)
    found = torch.autograd.grad(z, [x, *cell.parameters()], g)

    # dz = (dz W + z dW + dx) D with D the mask of what is above zero, solved densely, sample by sample.
    weight, on = weight_of(cell), (z > 0).double().detach()
    identity = torch.eye(WIDTH, dtype=torch.float64)
    adjoint = torch.stack(
        [
            mask * torch.linalg.solve(identity - weight.detach() * mask, row)
            for mask, row in zip(on, g, strict=True)
        ]
    )
    linear = (adjoint * (z.detach() @ weight + x)).sum()
    torch.testing.assert_close(
        found, torch.autograd.grad(linear, [x, *cell.parameters()]), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    ("backward", "solver"),
    [(Unroll(checkpoint=True), Picard()), (Reversible(), ReversiblePicard())],
    ids=["checkpoints", "reversible"],
)
def test_modes_that_evaluate_again_give_the_exact_gradient(backward: Backward, solver: Solver) -> None:
    cell, x = made(1.0, 1.0, 0), inputs()
    exact = torch.autograd.grad(tight(cell)(x).square().sum(), list(cell.parameters()))
    layer = ImplicitLayer(
        cell, backward=backward, solver=solver, stopping=Stopping(rtol=1e-10, max_steps=100)
    )
    found = torch.autograd.grad(layer(x).relu().square().sum(), list(cell.parameters()))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_the_inverse_is_made_once_a_solve_and_once_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made_ones = []
    plain = MonotoneCell._resolvent
    monkeypatch.setattr(MonotoneCell, "_resolvent", lambda self: made_ones.append(self) or plain(self))
    layer = tight(made(1.0, 2.0, 0))
    layer(inputs()).sum().backward()
    assert len(made_ones) == 2
    with torch.no_grad():
        layer(inputs())
    assert len(made_ones) == 3


def test_weights_that_change_between_two_solves_are_seen() -> None:
    cell, x = made(1.0, 1.0, 0), inputs()
    with torch.no_grad():
        layer = tight(cell)
        before = layer(x)
        cell.skew *= 3
        assert not torch.allclose(layer(x), before)


def test_transforms_give_what_plain_calls_give() -> None:
    layer, x = tight(made(1.0, 2.0, 0)), inputs()
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None])[0]))(x)
    for row, jacobian in zip(x, jacobians, strict=True):
        plain = torch.autograd.functional.jacobian(lambda one: layer(one[None])[0], row)
        torch.testing.assert_close(jacobian, plain, rtol=1e-6, atol=1e-8)


def test_it_solves_under_autocast_and_in_half_precision() -> None:
    cell, x = made(1.0, 1.0, 0), inputs()
    exact = tight(cell)(x).float()
    layer = nn.Sequential(ImplicitLayer(cell.float(), stopping=Stopping(rtol=2e-2)), nn.ReLU())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x.float()), exact, rtol=0.1, atol=0.1)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_what_does_not_fit_is_refused() -> None:
    cell = MonotoneCell(WIDTH)
    with pytest.raises(ValueError, match=r"an? input of shape \(\.\.\., 6\), got \(2, 5\); put nn.Linear"):
        cell(torch.zeros(2, 6), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"state of shape \(\.\.\., 6\), got \(2, 5\)"):
        cell(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="margin"):
        MonotoneCell(WIDTH, margin=0.0)
    with pytest.raises(ValueError, match="width"):
        MonotoneCell(0)

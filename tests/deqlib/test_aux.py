"""Cells that return more than the state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqlib
from deqlib import (
    JFB,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.nn import Dropout
from deqlib.regularizers import trajectory

A = 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TIGHT = Stopping(rtol=1e-10, max_steps=300)

MODES: dict[str, tuple[Backward, Solver]] = {
    "implicit": (ImplicitDifferentiation(stopping=TIGHT), Picard()),
    "jfb": (JFB(), Picard()),
    "phantom": (PhantomGradient(steps=2), Picard()),
    "neumann": (PhantomGradient(steps=2, form="neumann"), Picard()),
    "shared": (SharedInverse(), Broyden()),
    "stochastic": (StochasticJFB(no_grad=30, grad=30), Picard()),
    "unroll": (Unroll(), Picard()),
    "unroll, checkpointed": (Unroll(checkpoint=True), Picard()),
    "reversible": (Reversible(), ReversiblePicard()),
}


def plain(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ A + x)


def told(z: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The same map, with the products of state and input, and a number that is no tensor."""
    return plain(z, x), {"product": z * x, "name": "told", "none": None}


@pytest.mark.parametrize("name", MODES)
def test_the_auxiliary_output_is_the_cells_at_the_value_that_is_returned(name: str) -> None:
    backward, solver = MODES[name]
    settings: dict[str, Any] = {"solver": solver, "backward": backward, "stopping": TIGHT}
    for records in (False, True):
        x = X.clone().requires_grad_(records)
        z0 = torch.zeros_like(X)
        with torch.set_grad_enabled(records):
            alone = fixed_point(plain, z0, (x,), **settings)
            solution = fixed_point(told, z0, (x,), has_aux=True, **settings)
        assert alone.aux is None
        assert torch.equal(solution.value, alone.value)
        assert torch.equal(solution.aux["product"], solution.value * x)
        assert (solution.aux["name"], solution.aux["none"]) == ("told", None)
        # Off the tape, the solve ends with an evaluation at the value.
        assert solution.nfe == alone.nfe + records
        assert torch.equal(solution.sample_nfe, alone.sample_nfe + records)
        assert solution.aux["product"].requires_grad == records


@pytest.mark.parametrize("name", ["implicit", "stochastic", "unroll"])
def test_a_loss_in_the_auxiliary_output_has_the_gradient_of_the_whole_solve(name: str) -> None:
    """Against sixty iterations written out: the state in the loss is not held constant."""
    backward, solver = MODES[name]
    x, z = X.clone().requires_grad_(), torch.zeros_like(X)
    for _ in range(60):
        z = plain(z, x)
    expected = torch.autograd.grad((z * x).square().sum(), x)[0]
    z0 = torch.zeros_like(X)
    layer = ImplicitLayer(told, solver=solver, backward=backward, stopping=TIGHT, has_aux=True)
    for solution in (layer.solve(x, z0=z0), layer.solve(x)):
        (found,) = torch.autograd.grad(solution.aux["product"].square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    held = (solution.value.detach() * x).square().sum()
    assert not torch.allclose(torch.autograd.grad(held, x)[0], expected, rtol=1e-3)


def test_transforms_reach_the_auxiliary_output_too() -> None:
    layer = ImplicitLayer(told, stopping=TIGHT, backward=MODES["implicit"][0], has_aux=True)

    def loss(x: Tensor) -> Tensor:
        total: Tensor = layer.solve(x).aux["product"].square().sum()
        return total

    x = X.clone().requires_grad_()
    found = torch.func.grad(loss)(X)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x), x)[0], rtol=1e-6, atol=1e-8)


def test_a_finished_sample_that_left_the_batch_has_its_part_of_it() -> None:
    rates = torch.tensor([[0.0], [0.2], [0.9], [0.95]], dtype=torch.float64)
    settings: dict[str, Any] = {"solver": Picard(), "stopping": Stopping(rtol=1e-8, max_steps=900)}
    with torch.no_grad():
        solution = fixed_point(
            lambda z, r: (r * z + 1, r * z),
            torch.zeros(4, 1, dtype=torch.float64),
            (rates,),
            compact=True,
            has_aux=True,
            **settings,
        )
    assert int(solution.sample_nfe.min()) < solution.nfe
    assert torch.equal(solution.aux, rates * solution.value)


def test_a_fixed_number_of_steps_takes_one_more_evaluation_for_it_unless_one_measures() -> None:
    for measure, more in ((False, 1), (True, 0)):
        stopping = Stopping.steps(4, measure=measure)
        with torch.no_grad():
            alone = fixed_point(plain, torch.zeros_like(X), (X,), solver=Picard(), stopping=stopping)
            solution = fixed_point(
                told, torch.zeros_like(X), (X,), solver=Picard(), stopping=stopping, has_aux=True
            )
        assert solution.nfe == alone.nfe + more
        assert torch.equal(solution.aux["product"], solution.value * X)


def test_what_modules_drew_is_the_same_for_the_auxiliary_output() -> None:
    dropout = Dropout(0.5)

    def cell(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = dropout(torch.ones_like(z))
        return 0.3 * z * kept + x, kept

    solution = fixed_point(cell, torch.zeros(64, 4), (torch.ones(64, 4),), has_aux=True)
    # A kept number is doubled by dropout: its fixed point is 1 / (1 - 0.6), that of the others 1.
    torch.testing.assert_close(solution.value, torch.where(solution.aux > 0, 2.5, 1.0), rtol=1e-2, atol=0)


def test_nothing_of_it_is_recorded_where_autograd_is_off() -> None:
    def energy(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = (0.5 * z.square() - z * x).sum(1)
            (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        return z - 0.5 * slope, value

    with torch.no_grad():
        solution = fixed_point(energy, torch.zeros_like(X), (X,), has_aux=True)
    assert not solution.value.requires_grad
    assert not solution.aux.requires_grad


def test_a_copy_and_a_pickle_of_a_solution_have_it_without_its_graph() -> None:
    solution = fixed_point(told, torch.zeros_like(X), (X.clone().requires_grad_(),), has_aux=True)
    for twin in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert torch.equal(twin.aux["product"], solution.aux["product"])
        assert not twin.aux["product"].requires_grad


def test_a_record_keeps_none_of_it() -> None:
    with deqlib.record(values=True) as solves:
        fixed_point(told, torch.zeros_like(X), (X,), has_aux=True)
    assert [found.solution.aux for found in solves] == [None]


def test_layers_of_such_cells_are_diagnosed_and_regularised_like_others() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            image = torch.tanh(0.3 * self.inner(z) + x)
            return image, image.sum()

    x = X.float()
    layer = ImplicitLayer(Cell(), has_aux=True)
    assert "has_aux=True" in repr(layer)
    bare = ImplicitLayer(lambda z, x: layer.cell(z, x)[0])
    for ours, theirs in zip(trajectory(layer, x, steps=(1,)), trajectory(bare, x, steps=(1,)), strict=True):
        torch.testing.assert_close(ours, theirs)
    few: dict[str, Any] = {"solvers": [Picard()], "modes": [JFB()], "num_starts": 2, "rounds": 1}
    ours, theirs = (
        deqlib.diagnose(one, x, generator=torch.Generator().manual_seed(1), **few) for one in (layer, bare)
    )
    assert torch.equal(ours.spectral_norm, theirs.spectral_norm)


@pytest.mark.parametrize(
    ("returned", "got"),
    [(lambda z: z, "got Tensor"), (lambda z: (z, 1, 2), "got a tuple of 3"), (lambda z: [z, 1], "got list")],
)
def test_a_cell_that_returns_no_pair_is_told_so(returned: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"has_aux=True it must return a tuple \(z, aux\), {got}; leave"):
        fixed_point(returned, torch.zeros(2, 3), has_aux=True)


def test_a_cell_that_returns_a_pair_unasked_is_refused_as_ever() -> None:
    with pytest.raises(ValueError, match="must have the structure of the state"):
        fixed_point(lambda z: (z, 1.0), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="fixed_point: has_aux must be True or False, got 1"):
        fixed_point(lambda z: z, torch.zeros(2, 3), has_aux=1)  # type: ignore[arg-type]

"""Cells that are told which step of the solve it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deqlib
from deqlib import (
    JFB,
    Anderson,
    Auto,
    ImplicitLayer,
    Picard,
    Reversible,
    ReversiblePicard,
    Solver,
    Step,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.regularizers import trajectory

A = 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
E = 0.5 * torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def moving(z: Tensor, x: Tensor, *, step: Step) -> Tensor:
    """A map that adds a row of E, of the step that it is, and a share of how far the solve is."""
    return torch.tanh(z @ A + x + E[step.number] + (step.number / step.total).unsqueeze(1))


def by_hand(x: Tensor, first: int, last: int, total: int, z: Tensor) -> Tensor:
    for n in range(first, last):
        z = torch.tanh(z @ A + x + E[n] + n / total)
    return z


class Told:
    """A map that notes what it is told; its samples converge at rates of their own."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, z: Tensor, rate: Tensor, *, step: Step) -> Tensor:
        self.steps.append(Step(step.number.clone(), step.total.clone()))
        return rate * z + 1


RATES = torch.tensor([[0.0], [0.1], [0.5], [0.9]], dtype=torch.float64)


def test_a_fixed_number_of_steps_is_told_from_zero_with_its_total() -> None:
    settings: dict[str, Any] = {"solver": Picard(), "backward": Unroll(), "with_step": True}
    value = fixed_point(moving, torch.zeros_like(X), (X,), stopping=Stopping.steps(5), **settings).value
    torch.testing.assert_close(value, by_hand(X, 0, 5, 5, torch.zeros_like(X)))
    told = Told()
    stopping = Stopping.steps(3, measure=True)
    fixed_point(told, torch.zeros(4, 1, dtype=torch.float64), (RATES,), stopping=stopping, **settings)
    assert [step.number.tolist() for step in told.steps] == [[n] * 4 for n in range(4)]
    assert all(step.total.tolist() == [3] * 4 for step in told.steps)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_random_depth_tells_each_sample_its_own_steps_and_total(per_sample: bool, checkpoint: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    mode = StochasticJFB(
        no_grad=(0, 3), grad=2, per_sample=per_sample, generator=generator, checkpoint=checkpoint
    )
    x = X.clone().requires_grad_()
    settings: dict[str, Any] = {"solver": Picard(), "backward": mode, "with_step": True}
    depths = set()
    for _ in range(3):
        solution = fixed_point(moving, torch.zeros_like(x), (x,), **settings)
        totals, rows = solution.num_steps.tolist(), []
        for i, n in enumerate(totals):
            own = x[i : i + 1]
            start = by_hand(own, 0, n - 2, n, torch.zeros_like(own)).detach()
            rows.append(by_hand(own, n - 2, n, n, start))
        alone = torch.cat(rows)
        torch.testing.assert_close(solution.value, alone)
        ours, theirs = (torch.autograd.grad(v.square().sum(), x)[0] for v in (solution.value, alone))
        torch.testing.assert_close(ours, theirs)
        depths.add(len(set(totals)))
    assert (max(depths) > 1) == per_sample


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2), Auto()])
@pytest.mark.parametrize("compact", [False, True])
def test_a_finished_sample_keeps_the_number_of_steps_that_led_to_it(solver: Solver, compact: bool) -> None:
    told, z0 = Told(), torch.zeros(4, 1, dtype=torch.float64)
    stopping = Stopping(rtol=1e-6, max_steps=200, patience=None)
    rates = RATES.detach().clone().requires_grad_()
    settings: dict[str, Any] = {"solver": solver, "stopping": stopping, "backward": JFB()}
    solution = fixed_point(told, z0, (rates,), compact=compact, with_step=True, **settings)
    assert solution.converged.all()
    taken = solution.num_steps.tolist()
    assert len(set(taken)) > 1
    assert all((step.total == 200).all() for step in told.steps)
    assert told.steps[-1].number.tolist() == taken  # that for the gradient
    for evaluation, step in enumerate(told.steps[:-1]):
        if len(step.number) == 4 and not compact:
            assert step.number.tolist() == [min(evaluation, n) for n in taken]


def test_a_sample_of_a_batch_is_told_what_it_is_alone() -> None:
    def cell(z: Tensor, rate: Tensor, *, step: Step) -> Tensor:
        return rate * z + 1 + 0.5 ** step.number.unsqueeze(1)

    settings: dict[str, Any] = {"solver": Picard(), "stopping": Stopping(rtol=1e-4, max_steps=300)}
    settings |= {"with_step": True, "backward": JFB()}
    for compact in (False, True):
        rates = RATES.detach().clone().requires_grad_()
        z0 = torch.zeros(4, 1, dtype=torch.float64)
        together = fixed_point(cell, z0, (rates,), compact=compact, **settings)
        alone = [fixed_point(cell, z0[:1], (rates[i : i + 1],), **settings) for i in range(4)]
        assert together.num_steps.tolist() == [int(one.num_steps) for one in alone]
        assert together.converged.all()
        torch.testing.assert_close(together.value, torch.cat([one.value for one in alone]))
        (ours,) = torch.autograd.grad(together.value.sum(), rates)
        (theirs,) = torch.autograd.grad(sum(one.value.sum() for one in alone), rates)
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_is_that_of_the_map_of_the_step_after_the_last() -> None:
    x = X.clone().requires_grad_()
    stopping = Stopping.steps(7)
    value = fixed_point(
        moving, torch.zeros_like(x), (x,), solver=Picard(), stopping=stopping, backward=JFB(), with_step=True
    ).value
    (ours,) = torch.autograd.grad(value.sum(), x)
    image = torch.tanh(value.detach() @ A + x + E[7] + 1)
    torch.testing.assert_close(ours, torch.autograd.grad(image.sum(), x)[0])


def test_states_on_the_way_are_images_of_their_own_steps() -> None:
    layer = ImplicitLayer(
        moving, solver=Picard(), stopping=Stopping.steps(6), backward=Unroll(), with_step=True
    )
    states = trajectory(layer, X, steps=(2, 4, 9))
    # Where the solve does not get so far it is the value, after 6 steps, whose image is asked for.
    for state, n in zip(states, (3, 5, 7, 6), strict=True):
        torch.testing.assert_close(state, by_hand(X, 0, n, 6, torch.zeros_like(X)))


def test_what_cannot_be_told_is_refused() -> None:
    settings: dict[str, Any] = {"solver": ReversiblePicard(), "backward": Reversible(), "with_step": True}
    with pytest.raises(ValueError, match=r"Reversible: .*use backward=Unroll\(checkpoint=True\)"):
        fixed_point(moving, torch.zeros_like(X), (X,), **settings)
    with pytest.raises(TypeError, match="gives the cell its step by the name step"):
        fixed_point(moving, torch.zeros_like(X), (X,), {"step": 3}, with_step=True)
    with pytest.raises(TypeError, match="ImplicitLayer: with_step must be True or False, got 1"):
        ImplicitLayer(moving, with_step=1)  # type: ignore[arg-type]
    layer = ImplicitLayer(moving, solver=Picard(), stopping=Stopping.steps(2), with_step=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"with_step: a solve under torch\.vmap"):
        torch.vmap(layer)(X.expand(2, *X.shape))
    with pytest.raises(ValueError, match="diagnose: a cell of with_step=True is another map at every step"):
        deqlib.diagnose(layer, X)
    assert "with_step=True" in repr(layer)

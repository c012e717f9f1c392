from __future__ import annotations

import torch

from deqlib import ImplicitDifferentiation, Picard, Stopping, fixed_point
from deqlib.counting import CountedCell
from deqlib.testing import mixed_difficulty, tanh_rnn


def test_every_evaluation_is_counted_and_the_samples_in_it() -> None:
    base = mixed_difficulty(batch=8, width=6)
    counted = CountedCell(base.cell)
    rule = Stopping(rtol=1e-5, max_steps=500, patience=None)
    with torch.no_grad():
        found = fixed_point(counted, base.z0, base.inputs, solver=Picard(), stopping=rule, compact=True)
    assert counted.evaluations == found.nfe
    assert counted.samples == int(found.sample_nfe.sum()) < 8 * found.nfe
    assert counted.recorded == counted.products == 0


def test_evaluations_on_the_tape_and_products_with_the_jacobian_are_counted() -> None:
    base = tanh_rnn(batch=3, width=6, rate=0.5, dtype=torch.float64)
    x = base.inputs[0].clone().requires_grad_()
    counted, steps = CountedCell(base.cell), 7
    mode = ImplicitDifferentiation(solver=Picard(), stopping=Stopping.steps(steps))
    found = fixed_point(counted, base.z0, (x, *base.inputs[1:]), backward=mode)
    assert (counted.evaluations, counted.recorded) == (found.nfe, 1)
    found.value.sum().backward()
    assert counted.products == steps + 1  # one more for the gradient itself


def test_products_are_counted_once_however_many_leaves_a_state_has() -> None:
    counted = CountedCell(lambda z: {"a": 2 * z["a"], "b": 3 * z["b"]})
    z = {"a": torch.ones(2, 1, requires_grad=True), "b": torch.ones(2, 1, requires_grad=True)}
    image = counted(z)
    torch.cat(list(image.values()), 1).sum().backward()
    assert (counted.evaluations, counted.samples, counted.recorded, counted.products) == (1, 2, 1, 1)


def test_counting_leaves_the_cells_own_tensors_alone() -> None:
    own = 2 * torch.ones(2, 1, requires_grad=True)
    counted = CountedCell(lambda z: own)
    counted(torch.zeros(2, 1))
    own.sum().backward()
    assert counted.products == 0


def test_a_counted_cell_counts_evaluations_samples_and_products_and_changes_no_gradient() -> None:
    counted = CountedCell(lambda z, x: torch.sin(z) * x)
    z, x = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    image = counted(z, x)
    counted(z[:1].detach(), x[:1])
    assert (counted.evaluations, counted.samples, counted.products) == (2, 4, 0)
    g = torch.randn(3, 2)
    for number in (1, 2):
        (found,) = torch.autograd.grad(image, z, g, retain_graph=True)
        assert counted.products == number
        torch.testing.assert_close(found, torch.cos(z) * x * g)
        assert counted.gradient is not None
        assert torch.equal(counted.gradient, g)

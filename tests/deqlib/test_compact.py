"""Finished samples leave the batch that the cell sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.testing import mixed_difficulty

SOLVERS = {
    "picard": Picard(),
    "anderson": Anderson(memory=3),
    "broyden": Broyden(memory=4),
    "newton": NewtonKrylov(memory=4),
    "auto": Auto(methods=(Picard(), Anderson(), Broyden()), patience=3),
}


def rated(z: Tensor, x: Tensor, rates: Tensor) -> Tensor:
    return torch.tanh(rates * z.roll(1, 1) + x)


@pytest.mark.parametrize("name", SOLVERS)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95, float("nan")]), min_size=0, max_size=9),
    check_every=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_compact_solve_is_the_same_solve(
    name: str, rates: list[float], check_every: int, seed: int
) -> None:
    x = torch.randn(len(rates), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    column = torch.tensor(rates, dtype=torch.float64).view(-1, 1)
    stopping = Stopping(rtol=1e-8, max_steps=60, check_every=check_every)
    with torch.no_grad():
        full, compact = (
            fixed_point(
                rated,
                torch.zeros_like(x),
                (x, column),
                solver=SOLVERS[name],
                stopping=stopping,
                on_failure="ignore",
                compact=c,
            )
            for c in (False, True)
        )
    for field in ("status", "num_steps", "nfe", "method"):
        assert torch.equal(torch.as_tensor(getattr(full, field)), torch.as_tensor(getattr(compact, field)))
    for field in ("value", "residual", "relative_residual", "trace"):
        torch.testing.assert_close(
            getattr(full, field), getattr(compact, field), rtol=1e-7, atol=1e-9, equal_nan=True
        )
    assert (full.sample_nfe == full.nfe).all()
    assert (compact.sample_nfe <= full.sample_nfe).all()
    assert (compact.sample_nfe >= compact.num_steps + 1).all()


class Spy:
    """A cell that notes the shapes it is given."""

    def __init__(self, cell: Any) -> None:
        self.cell, self.calls = cell, []

    def __call__(self, z: Any, *inputs: Any) -> Any:
        self.calls.append((z.shape[0], *(tuple(x.shape) for x in inputs if isinstance(x, Tensor))))
        return self.cell(z, *inputs)


def test_the_cell_sees_fewer_samples_and_the_count_of_its_work_is_exact() -> None:
    base = mixed_difficulty(batch=8, width=6)
    spy = Spy(base.cell)
    with torch.no_grad():
        solution = fixed_point(
            spy,
            base.z0,
            base.inputs,
            solver=Picard(),
            stopping=Stopping(rtol=1e-5, max_steps=500, patience=None),
            compact=True,
        )
    batches = [call[0] for call in spy.calls]
    assert batches == sorted(batches, reverse=True)
    assert (batches[0], batches[-1]) == (8, 1)
    assert int(solution.sample_nfe.sum()) == sum(batches)
    assert all(call[1:] == ((call[0], 6), (call[0], 1), (6, 6)) for call in spy.calls)
    assert int(solution.sample_nfe.sum()) < 0.35 * 8 * solution.nfe


def test_one_hard_sample_of_32_costs_a_third_of_the_work_at_most() -> None:
    base = mixed_difficulty(batch=32)
    stopping = Stopping(rtol=1e-4, max_steps=2000, patience=None)
    with torch.no_grad():
        full, compact = (
            fixed_point(base.cell, base.z0, base.inputs, solver=Picard(), stopping=stopping, compact=c)
            for c in (False, True)
        )
    easy, hard = int(full.num_steps[:-1].max()), int(full.num_steps[-1])
    assert hard >= 20 * easy
    assert int(compact.sample_nfe.sum()) <= 0.35 * int(full.sample_nfe.sum())


def shared(z: Tensor, x: Tensor, matrix: Tensor, rates: Tensor) -> Tensor:
    assert matrix.shape == (4, 4)
    return rates.T * (z @ matrix) + x


def test_a_tuple_says_which_axis_of_each_input_is_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]  # as long as x
    rates = torch.tensor([[0.1, 0.2, 0.3, 0.95]], dtype=torch.float64)  # the batch last
    arguments = {"solver": Picard(), "stopping": Stopping(rtol=1e-8, max_steps=500)}
    with torch.no_grad():
        full = fixed_point(shared, torch.zeros_like(x), (x, matrix, rates), **arguments)
        compact = fixed_point(
            shared, torch.zeros_like(x), (x, matrix, rates), compact=(0, None, 1), **arguments
        )
        assert compact.sample_nfe.sum() < full.sample_nfe.sum()
        torch.testing.assert_close(full.value, compact.value, rtol=1e-12, atol=1e-12)
        with pytest.raises(AssertionError):  # the automatic rule takes the matrix for a batch
            fixed_point(shared, torch.zeros_like(x), (x, matrix, rates), compact=True, **arguments)
        with pytest.raises(ValueError, match="axis 1 is the batch of 4 samples, got a tensor of shape"):
            fixed_point(
                shared,
                torch.zeros_like(x),
                (x, matrix, rates[:, :1].expand(1, 1)),
                compact=(0, None, 1),
                **arguments,
            )


def test_states_and_inputs_may_be_pytrees() -> None:
    rates = torch.tensor([0.01, 0.2, 0.5], dtype=torch.float64)

    def cell(z: Any, inputs: Any) -> Any:
        return {"a": inputs["rate"][:, None] * z["b"] + 1, "b": torch.cos(z["a"]) + inputs["offset"]}

    z0 = {"a": torch.zeros(3, 2).double(), "b": torch.zeros(3, 2).double()}
    inputs = {"rate": rates, "offset": 0.5}
    with torch.no_grad():
        full, compact = (
            fixed_point(cell, z0, (inputs,), stopping=Stopping(rtol=1e-7), solver=Anderson(), compact=c)
            for c in (False, True)
        )
    assert compact.sample_nfe.sum() < full.sample_nfe.sum()
    torch.testing.assert_close(full.value, compact.value)


@pytest.mark.parametrize(
    "backward", [JFB(), ImplicitDifferentiation(stopping=Stopping(rtol=1e-10)), Unroll()]
)
@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=3)], ids=["picard", "anderson"])
def test_gradients_are_those_of_the_full_solve(backward: Any, solver: Any) -> None:
    gradients = []
    for compact in (False, True):
        x = torch.randn(
            5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).requires_grad_()
        rates = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9], dtype=torch.float64).view(5, 1).requires_grad_()
        layer = ImplicitLayer(
            rated,
            solver=solver,
            backward=backward,
            stopping=Stopping(rtol=1e-9, max_steps=300),
            compact=compact,
        )
        gradients.append(torch.autograd.grad(layer(x, rates).square().sum(), (x, rates)))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"compact": 1}, TypeError, "compact must be True, False, or a tuple"),
        ({"compact": ("x",)}, TypeError, "compact must be True, False, or a tuple"),
        ({"compact": (0, 0)}, ValueError, r"one axis \(or None\) for each of 1 inputs"),
        ({"compact": True, "stopping": Stopping.steps(3)}, ValueError, "compact has no effect"),
    ],
)
def test_what_cannot_be_is_refused(arguments: Any, error: type[Exception], words: str) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(error, match=words):
        fixed_point(lambda z, x: 0.5 * z + x, x, (x,), **arguments)

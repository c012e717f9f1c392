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
    Status,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.nn import Dropout
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
    for field in ("status", "num_steps", "method"):
        assert torch.equal(torch.as_tensor(getattr(full, field)), torch.as_tensor(getattr(compact, field)))
    for field in ("value", "residual", "relative_residual", "trace"):
        torch.testing.assert_close(
            getattr(full, field), getattr(compact, field), rtol=1e-7, atol=1e-9, equal_nan=True
        )
    assert (full.sample_nfe == full.nfe).all()
    loop, failed = len(full.trace), 0 if full.converged.all() else len(rates)
    # One evaluation says whether all are CONVERGED; where some are not, one of each part asks for its cut.
    assert full.nfe <= loop + 1
    assert compact.nfe <= loop + 1 + failed
    assert (compact.sample_nfe <= loop + 1 + failed).all()
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
    assert int(solution.sample_nfe.sum()) == sum(batches)
    assert len(batches) == solution.nfe
    *loop, last = batches
    assert loop == sorted(loop, reverse=True)
    assert (loop[0], loop[-1], last) == (8, 1, 8)  # the whole batch has the last word
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
        with pytest.raises(ValueError, match=r"in a tuple, here compact=\(0, 0, None\)"):
            # The automatic rule takes the matrix for a batch.
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
    rates = torch.tensor([0.01, 0.2, 0.95], dtype=torch.float64)

    def cell(z: Any, inputs: Any) -> Any:
        return {"a": inputs["rate"][:, None] * z["b"] + 1, "b": torch.cos(z["a"]) + inputs["offset"]}

    z0 = {"a": torch.zeros(3, 2).double(), "b": torch.zeros(3, 2).double()}
    inputs = {"rate": rates, "offset": 0.5}
    with torch.no_grad():
        full, compact = (
            fixed_point(cell, z0, (inputs,), stopping=Stopping(max_steps=500), solver=Picard(), compact=c)
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


def shared_bias(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * z.roll(1, 1) + x + own[0]


def shared_matrix(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * torch.tanh(z @ own) + x


def shared_factor(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * torch.tanh(z @ own.mT @ own) + x  # a rank as large as the batch


def shared_table(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * torch.tanh(z) + x + own.mean()


def nested(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * torch.tanh(z) + x + own["bias"][1].mean()  # type: ignore[call-overload]


def of_each(z: Tensor, x: Tensor, gain: Tensor, own: Tensor) -> Tensor:
    return gain * torch.tanh(z * own) + x


SHARING = [shared_bias, shared_matrix, shared_factor, shared_table, nested, of_each]


@pytest.mark.parametrize("cell", SHARING)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 6),
    name=st.sampled_from(sorted(SOLVERS)),
    grad=st.booleans(),
    max_steps=st.sampled_from([5, 30, 300]),
)
def test_a_guess_gives_what_the_whole_batch_gives_or_is_refused_by_name(
    cell: Any, seed: int, batch: int, name: str, grad: bool, max_steps: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, batch, generator=draw, dtype=torch.float64)  # as wide as it is long
    own: Any = torch.linalg.qr(torch.randn(batch, batch, generator=draw, dtype=torch.float64))[0]
    own = {"bias": [1.0, own]} if cell is nested else own
    gain = torch.rand(batch, 1, generator=draw, dtype=torch.float64)
    call = {"solver": SOLVERS[name], "stopping": Stopping(rtol=1e-8, max_steps=max_steps)}
    call |= {"on_failure": "ignore", "backward": JFB()}
    with torch.set_grad_enabled(grad):
        whole, told = (
            fixed_point(cell, torch.zeros_like(x), (x, gain, own), compact=c, **call)
            for c in (False, (0, 0, 0 if cell is of_each else None))
        )
        torch.testing.assert_close(told.value, whole.value, rtol=1e-6, atol=1e-9)
        assert torch.equal(told.status, whole.status)
        try:
            guessed = fixed_point(cell, torch.zeros_like(x), (x, gain, own), compact=True, **call)
        except ValueError as error:
            assert cell is not of_each
            assert "in a tuple, here compact=(0, 0, " in str(error)  # noqa: PT017
            return
    torch.testing.assert_close(guessed.value, whole.value, rtol=1e-5, atol=1e-7)
    assert torch.equal(guessed.status, whole.status)


def test_a_guess_is_looked_at_once_where_a_sample_fails_at_last() -> None:
    gain = torch.tensor([[0.1], [0.5], [0.8], [0.9], [0.97], [0.999]], dtype=torch.float64)
    call = {"solver": Picard(), "stopping": Stopping(rtol=1e-6, max_steps=400), "on_failure": "ignore"}
    batches: list[int] = []

    def cell(z: Tensor, gain: Tensor) -> Tensor:
        batches.append(len(z))
        return gain * z + 1

    found = fixed_point(cell, torch.zeros(6, 3, dtype=torch.float64), (gain,), compact=True, **call)
    assert found.counts() == {Status.CONVERGED: 5, Status.MAX_STEPS: 1}
    assert found.nfe == len(batches)
    assert len(set(batches)) > 3  # left one after the other
    assert batches[-2:] == [6, 1]  # the whole batch, and the one that the sample failed in
    assert batches[:-2] == sorted(batches[:-2], reverse=True)


@pytest.mark.parametrize("compact", [True, (0,)])
def test_what_the_cell_captures_is_named_as_what_cannot_be_cut(compact: Any) -> None:
    gain = torch.tensor([[0.1], [0.2], [0.2], [0.99]])
    call = {"solver": Picard(), "stopping": Stopping(max_steps=500), "compact": compact}
    for captured in (gain, gain.expand(4, 5)):
        with pytest.raises(ValueError, match="what the cell captures cannot be cut and belongs in args"):
            fixed_point(lambda z, x, g=captured: g * z + x, torch.zeros(4, 5), (torch.ones(4, 5),), **call)


def test_samples_that_depend_on_one_another_are_refused_where_the_cut_shows_it() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 5)[:, None]
    cell = lambda z, x: 0.9 * torch.tanh(z - z.mean(0)) + x  # noqa: E731
    for rule in (Stopping(max_steps=200), Stopping(max_steps=12)):
        with pytest.raises(ValueError, match="samples depend on one another, compact=False"):
            fixed_point(cell, torch.zeros_like(x), (x,), solver=Picard(), stopping=rule, compact=True)


def test_an_error_of_the_cell_that_is_no_fault_of_the_cut_stays_its_own() -> None:
    calls = []

    def cell(z: Tensor, gain: Tensor) -> Tensor:
        calls.append(len(z))
        if calls.count(len(z)) == 3 and len(z) < 4:
            raise KeyError("late")
        return gain * z + 1

    gain = torch.tensor([[0.01], [0.01], [0.01], [0.99]])
    with pytest.raises(KeyError, match="late"):
        fixed_point(cell, torch.zeros(4, 2), (gain,), solver=Picard(), compact=(0,))


@pytest.mark.parametrize("compact", [True, (0, 0)])
def test_a_mask_of_dropout_is_cut_with_its_samples(compact: Any) -> None:
    dropout, x = Dropout(0.5), torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.95]).view(6, 1)
    values = []
    for c in (False, compact):
        torch.manual_seed(3)
        found = fixed_point(
            lambda z, x, gain: gain * torch.tanh(dropout(z)) + x,
            torch.zeros_like(x),
            (x, gain),
            solver=Picard(),
            stopping=Stopping(rtol=1e-5, max_steps=300),
            compact=c,
            on_failure="raise",
        )
        values.append(found.value.detach())
    torch.testing.assert_close(*values)

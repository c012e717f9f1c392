"""Streams: each sample as if it were alone, in order, at the cost of what it needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import problem
from torch import Tensor

from deqlib import (
    Anderson,
    Auto,
    Broyden,
    FailurePolicy,
    ImplicitLayer,
    NewtonKrylov,
    NonConvergenceError,
    Picard,
    Solution,
    Solver,
    Status,
    Stopping,
    record,
    solve_stream,
)
from deqlib.nn import Dropout
from deqlib.testing import problems

RULE = Stopping(rtol=1e-8, max_steps=400)
SOLVERS: list[Solver] = [
    Picard(),
    Anderson(memory=3),
    Broyden(),
    NewtonKrylov(derivative="jvp"),
    Auto(),
    Auto(methods=(NewtonKrylov(derivative="jvp"), Anderson()), plain_steps=4),
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rated(z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    """Every sample by itself, in log(rtol) / log(rate) plain steps."""
    return rate * z.roll(1, -1) + x


def samples_of(rates: list[float], width: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Each with its inputs: the fixed point is 1, 2, 3, ..."""
    solution = torch.arange(1.0, width + 1, dtype=torch.float64)
    tensors = [torch.tensor([rate], dtype=torch.float64) for rate in rates]
    return [(solution - rate * solution.roll(1), rate) for rate in tensors]


class Counted:
    """A cell that notes how many samples each evaluation was of."""

    def __init__(self, cell: Any) -> None:
        self.cell, self.sizes = cell, []

    def __call__(self, z: Any, *inputs: Any, **keywords: Any) -> Any:
        self.sizes.append(len(z))
        return self.cell(z, *inputs, **keywords)


@given(
    solver=st.sampled_from(SOLVERS),
    rates=st.lists(st.floats(0.05, 0.95), max_size=12),
    batch_size=st.integers(1, 6),
)
def test_a_sample_is_solved_as_if_it_were_alone(solver: Solver, rates: list[float], batch_size: int) -> None:
    layer = ImplicitLayer(rated, solver=solver, stopping=RULE, on_failure="raise")
    samples = samples_of(rates)
    with torch.no_grad():
        found = list(solve_stream(layer, iter(samples), batch_size=batch_size))
        assert len(found) == len(samples)
        for sample, solution in zip(samples, found, strict=True):
            alone = layer.solve(*(part[None] for part in sample))
            torch.testing.assert_close(solution.value, alone.value, rtol=1e-9, atol=1e-9)
            assert solution.nfe == alone.nfe + 1  # the one that confirms it
            assert int(solution.sample_nfe) == solution.nfe
            for name in ("num_steps", "status", "method"):
                assert torch.equal(getattr(solution, name), getattr(alone, name)), name
            assert alone.trace is not None
            assert solution.trace is not None
            assert solution.trace.shape == alone.trace.shape


def test_a_few_hard_samples_do_not_hold_up_the_others() -> None:
    easy, hard = 0.3, 0.3 ** (1 / 21.6)  # twenty times the steps, the last of them counted
    cell = Counted(rated)
    layer = ImplicitLayer(cell, solver=Picard(), stopping=Stopping(rtol=1e-5, max_steps=1000))
    samples = samples_of([hard if i % 16 == 5 else easy for i in range(512)])
    x, rate = (torch.stack(column) for column in zip(*samples, strict=True))
    batches = [layer.solve(*batch) for batch in zip(x.split(32), rate.split(32), strict=True)]
    batch_by_batch, cell.sizes = cell.sizes, []
    stream = solve_stream(layer, samples, batch_size=32)
    found = list(stream)
    assert 19 < int(found[5].num_steps) / int(found[0].num_steps) < 21
    assert sum(batch_by_batch) >= 2.5 * stream.report.sample_nfe
    assert len(batch_by_batch) >= 2.5 * stream.report.nfe  # places are taken again
    expected = torch.cat([solution.value for solution in batches])
    torch.testing.assert_close(torch.cat([solution.value for solution in found]), expected)


def test_the_report_counts_what_the_cell_was_evaluated_on() -> None:
    cell = Counted(rated)
    layer = ImplicitLayer(cell, solver=Picard(), stopping=RULE)
    stream = solve_stream(layer, samples_of([0.1, 0.9, 0.5, 0.2, 0.3, 0.8, 0.1]), batch_size=3)
    found = list(stream)
    report = stream.report
    assert report.num_samples == 7
    assert report.nfe == len(cell.sizes)
    assert report.sample_nfe == sum(cell.sizes) == sum(solution.nfe for solution in found)
    assert max(cell.sizes) == 3
    assert report.occupancy == pytest.approx(sum(cell.sizes) / len(cell.sizes) / 3)
    assert report.seconds > 0
    assert report.samples_per_second == pytest.approx(7 / report.seconds)
    assert repr(report).startswith("StreamReport(7 samples in ")


def test_samples_are_drawn_when_there_is_room_for_them() -> None:
    drawn = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal drawn
        for sample in itertools.cycle(samples_of([0.3, 0.9])):
            drawn += 1
            yield sample

    layer = ImplicitLayer(rated, solver=Picard(), stopping=RULE)
    stream = solve_stream(layer, endless(), batch_size=4)
    assert drawn == 0
    next(stream)
    assert drawn < 100


def test_a_lost_sample_fails_alone() -> None:
    samples = samples_of([0.5, 0.5, 0.9, 0.4])
    samples[1] = (torch.full((3,), torch.nan, dtype=torch.float64), samples[1][1])
    layer = ImplicitLayer(rated, solver=Picard(), stopping=RULE, on_failure="ignore")
    found = list(solve_stream(layer, samples, batch_size=2))
    assert [Status(int(solution.status)) for solution in found] == [
        Status.CONVERGED,
        Status.DIVERGED,
        Status.CONVERGED,
        Status.CONVERGED,
    ]


def test_samples_that_depend_on_one_another_are_told() -> None:
    def coupled(z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return rated(z, x, rate) + 0.1 * z.mean(0)

    layer = ImplicitLayer(coupled, solver=Picard(), stopping=RULE, on_failure="ignore")
    found = list(solve_stream(layer, samples_of([0.2, 0.8, 0.5, 0.3]), batch_size=2))
    assert Status.COUPLED in [int(solution.status) for solution in found]


def test_a_stream_goes_on_behind_samples_that_failed() -> None:
    layer = ImplicitLayer(
        rated, solver=Picard(), stopping=Stopping(rtol=1e-8, max_steps=30), on_failure="raise"
    )
    stream = solve_stream(layer, samples_of([0.2, 0.9, 0.3]), batch_size=1)
    assert bool(next(stream).converged)
    with pytest.raises(NonConvergenceError, match="1 of 1 samples did not converge") as failure:
        next(stream)
    assert failure.value.solution.value.shape == (1, 3)
    assert bool(next(stream).converged)
    with pytest.raises(StopIteration):
        next(stream)
    layer.on_failure = FailurePolicy(action="raise", tolerated=0.5)
    assert len(list(solve_stream(layer, samples_of([0.2, 0.9, 0.3]), batch_size=3))) == 3


def test_states_and_inputs_may_be_trees_and_some_inputs_are_shared() -> None:
    def cell(z: dict[str, Tensor], x: dict[str, Tensor], *, weight: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * z["b"] @ weight + x["a"], "b": torch.tanh(z["a"]) + x["b"]}

    # As many rows as samples that enter together: it must not be taken for the batch.
    weight = torch.eye(4, dtype=torch.float64).roll(1, 0)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(7, 4, dtype=torch.float64, generator=generator) for name in "ab"}
    samples = [{name: part[i] for name, part in x.items()} for i in range(7)]
    layer = ImplicitLayer(cell, stopping=RULE, on_failure="raise")
    expected = layer(x, weight=weight)
    found = list(solve_stream(layer, samples, batch_size=4, kwargs={"weight": weight}))
    for name in "ab":
        torch.testing.assert_close(torch.cat([solution.value[name] for solution in found]), expected[name])


def test_a_tensor_is_as_many_samples_as_it_has_rows_and_places_converge_by_themselves() -> None:
    p = problem("tanh", batch=5, dim=6)
    x, weight = p.inputs
    rule = Stopping(rtol=1e-6, norm_axes=(-1,), max_steps=200)
    layer = ImplicitLayer(p.cell, solver=Picard(), stopping=rule, on_failure="raise")
    tokens = torch.stack([x, 1e-3 * x], 1)  # (5, 2, 6)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return p.cell(z, x, weight)

    layer = ImplicitLayer(cell, solver=Picard(), on_failure="raise")
    found = list(solve_stream(layer, tokens, batch_size=2, stopping=rule))
    expected = layer.solve(tokens, stopping=rule)
    assert torch.equal(torch.cat([solution.num_steps for solution in found]), expected.num_steps)
    torch.testing.assert_close(torch.cat([solution.value for solution in found]), expected.value)


def test_a_record_holds_every_sample_once() -> None:
    layer = ImplicitLayer(rated, solver=Picard(), stopping=RULE)
    with record() as solves:
        list(solve_stream(layer, samples_of([0.2, 0.9, 0.3, 0.4, 0.6]), batch_size=2))
    assert sum(len(solve.solution.status) for solve in solves) == 5
    assert {solve.kind for solve in solves} == {"forward"}


def test_float16_states_are_kept_as_in_a_batch() -> None:
    p = problems.mixed_difficulty(batch=6, width=8, easy=0.3, hard=0.8, dtype=torch.float16)
    x, rates, basis = p.inputs
    layer = ImplicitLayer(lambda *z: p.cell(*z, basis), solver=Picard(), stopping=Stopping(rtol=1e-2))
    found = list(solve_stream(layer, zip(x, rates, strict=True), batch_size=4))
    assert {solution.value.dtype for solution in found} == {torch.float16}
    torch.testing.assert_close(torch.cat([s.value for s in found]), layer(x, rates), rtol=1e-2, atol=1e-2)


def good() -> tuple[ImplicitLayer, list[Any]]:
    return ImplicitLayer(rated, solver=Picard(), stopping=RULE), list(samples_of([0.2, 0.3]))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layer": rated}, TypeError, "layer must be a deqlib.ImplicitLayer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"stopping": 3}, TypeError, "stopping must be a deqlib.Stopping"),
        ({"stopping": Stopping.steps(3)}, ValueError, "no sample finishes early"),
        ({"samples": (torch.zeros(2, 3), torch.zeros(2, 1))}, TypeError, r"pass zip\(x, y\)"),
        ({"samples": 3}, TypeError, "samples must be an iterable of samples"),
        ({"samples": [(torch.zeros(3), 0.5)]}, TypeError, "got a float in sample 0"),
        ({"samples": [torch.zeros(3), torch.zeros(4)]}, ValueError, r"\(4,\) float32 on cpu as sample 1"),
        ({"samples": [torch.zeros(3), (torch.zeros(3),) * 2]}, ValueError, "structure"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_no_stream_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layer, samples = good()
    given = {"layer": layer, "samples": samples, "batch_size": 2} | changed
    with pytest.raises(error, match=message):
        list(solve_stream(**given))


def test_a_starting_point_of_another_batch_is_refused() -> None:
    layer, samples = good()
    layer.init = lambda *inputs: torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="init must make a state of as many samples as its inputs have, 2"):
        next(solve_stream(layer, samples, batch_size=2))


def test_a_stream_is_refused_where_autograd_records() -> None:
    layer, samples = good()
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"call it under torch\.no_grad"):
        solve_stream(layer, samples, batch_size=2)


def test_values_carry_no_gradient_wherever_they_are_drawn() -> None:
    layer, samples = good()
    stream = solve_stream(layer, [(x.requires_grad_(), rate) for x, rate in samples], batch_size=2)
    with torch.enable_grad():
        assert not any(solution.value.requires_grad for solution in stream)


def test_a_cell_that_draws_masks_is_refused() -> None:
    dropout = Dropout(0.5)
    layer = ImplicitLayer(lambda z, x: 0.5 * dropout(z) + x, solver=Picard())
    with pytest.raises(ValueError, match=r"call layer\.eval\(\)"):
        next(solve_stream(layer, torch.ones(3, 4), batch_size=2))
    dropout.eval()
    found = [solution.value for solution in solve_stream(layer, torch.ones(3, 4), batch_size=2)]
    torch.testing.assert_close(torch.cat(found), torch.full((3, 4), 2.0), rtol=1e-2, atol=0)


def test_a_solution_of_a_stream_is_one_of_a_batch_of_one() -> None:
    layer, samples = good()
    solution = next(solve_stream(layer, samples, batch_size=2))
    assert isinstance(solution, Solution)
    assert solution.value.shape == (1, 3)
    assert solution.state is None
    assert repr(solution).startswith("Solution(1 converged; nfe=")

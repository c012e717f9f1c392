"""`deqlib.record`: every solve of a block, forward, adjoint and tangent."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import deqlib
from deqlib import (
    JFB,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    Picard,
    RecordedSolves,
    Status,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.recording import RecordedSolve, is_recording

DIM = 4


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def model() -> nn.Sequential:
    return nn.Sequential(ImplicitLayer(Cell()), nn.Linear(DIM, DIM), ImplicitLayer(Cell(), backward=JFB()))


def passes(solves: RecordedSolves) -> list[tuple[str, str]]:
    return [(solve.layer, solve.kind) for solve in solves]


def test_a_training_step_shows_all_of_its_solves() -> None:
    net = model()
    with deqlib.record() as solves:
        net(torch.randn(3, DIM)).sum().backward()
    assert passes(solves) == [("0", "forward"), ("2", "forward"), ("0", "adjoint")]
    assert all(solve.solution.counts() == {Status.CONVERGED: 3} for solve in solves)


@pytest.mark.parametrize("values", [False, True])
def test_a_recorded_solve_is_the_one_that_the_caller_got_but_off_the_graph(values: bool) -> None:
    layer, x = ImplicitLayer(Cell()), torch.randn(3, DIM)
    with deqlib.record(values=values) as solves:
        solution = layer.solve(x)
    (solve,) = solves
    kept = solve.solution
    assert (kept.nfe, kept.methods, kept.state) == (solution.nfe, solution.methods, None)
    for name in ("residual", "relative_residual", "num_steps", "status", "sample_nfe", "trace", "method"):
        assert torch.equal(getattr(kept, name), getattr(solution, name))
        assert not getattr(kept, name).requires_grad
    if not values:
        assert kept.value is None
        return
    assert torch.equal(kept.value, solution.value)
    assert not kept.value.requires_grad
    with torch.no_grad():
        solution.value.zero_()  # the caller's own
    assert kept.value.abs().sum() > 0


def test_solves_outside_of_the_block_are_not_seen() -> None:
    layer, x = ImplicitLayer(Cell()), torch.randn(3, DIM)
    layer(x)
    with deqlib.record() as solves:
        loss = layer(x).sum()
    loss.backward()
    assert passes(solves) == [("ImplicitLayer of Cell", "forward")]
    assert not is_recording()


def test_a_backward_pass_is_seen_by_the_block_that_it_runs_in_whatever_the_thread() -> None:
    loss = nn.Sequential(ImplicitLayer(Cell()))(torch.randn(3, DIM)).sum()
    with deqlib.record() as solves:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert [solve.kind for solve in solves] == ["adjoint"]


def test_blocks_in_one_another_see_the_same_and_end_by_themselves() -> None:
    layer, x = ImplicitLayer(Cell()), torch.randn(3, DIM)
    with deqlib.record() as outer:
        layer(x)
        with deqlib.record(values=True) as inner:
            layer(x)
        layer(x)
    assert (len(outer), len(inner)) == (3, 1)
    assert outer[1].solution.value is None
    solves = RecordedSolves()

    def fail() -> None:
        with deqlib.record() as found:
            layer(x)
            solves.extend(found)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert len(solves) == 1
    assert not is_recording()
    assert isinstance(solves[0], RecordedSolve)


@pytest.mark.parametrize("on_failure", ["ignore", "raise"])
def test_failures_are_seen_whatever_the_policy(on_failure: Any) -> None:
    few = Stopping(rtol=1e-9, max_steps=2)
    backward = ImplicitDifferentiation(stopping=few)
    x = torch.randn(3, DIM)
    with deqlib.record(values=True) as solves:
        for layer in (
            ImplicitLayer(Cell(), stopping=few, on_failure=on_failure, backward=JFB()),
            ImplicitLayer(Cell(), backward=backward, on_failure=on_failure),
        ):
            try:
                layer(x).sum().backward()
            except NonConvergenceError:
                assert on_failure == "raise"
    assert [solve.kind for solve in solves] == ["forward", "forward", "adjoint"]
    failed = [solves[0].solution, solves[2].solution]
    assert all(solution.counts() == {Status.MAX_STEPS: 3} for solution in failed)
    assert all(solution.value.shape == (3, DIM) for solution in failed)


def test_fixed_steps_and_plain_functions_are_seen() -> None:
    with deqlib.record() as solves:
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), stopping=Stopping.steps(3))
    assert solves[0].layer.startswith(
        "test_fixed_steps_and_plain_functions_are_seen.<locals>.<lambda> (test_"
    )
    assert solves[0].solution.counts() == {Status.COMPLETED: 2}
    assert "2 completed" in repr(solves)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own making
def test_a_compiled_layer_is_seen_where_it_solves_to_a_tolerance() -> None:
    net = model()
    compiled = torch.compile(net, backend="eager")
    with deqlib.record() as solves:
        compiled(torch.randn(3, DIM)).sum().backward()
    assert passes(solves) == [("0", "forward"), ("2", "forward"), ("0", "adjoint")]


def test_transforms_and_derivatives_of_second_order_are_seen() -> None:
    layer, x = ImplicitLayer(Cell()), torch.randn(3, DIM)
    with deqlib.record(values=True) as solves:
        torch.func.grad(lambda x: layer(x).sum())(x)
        torch.func.jvp(layer, (x,), (x,))
        torch.vmap(lambda x: layer(x.unsqueeze(0)))(x)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
        g.sum().backward()
    kinds = [solve.kind for solve in solves]
    assert kinds[:5] == ["forward", "adjoint", "forward", "tangent", "forward"]
    assert kinds[5:7] == ["forward", "adjoint"]
    assert len(kinds) > 7
    for solve in solves:
        assert solve.solution.value.shape == (3, DIM)  # under vmap the samples of all batches
        assert not solve.solution.value.requires_grad
        assert solve.solution.counts() == {Status.CONVERGED: 3}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
def test_a_recorded_iteration_under_a_transform_can_be_read_when_it_is_over(transform: Any) -> None:
    layer = ImplicitLayer(Cell(), solver=Picard(), backward=Unroll(), stopping=Stopping.steps(3))
    with deqlib.record(values=True) as solves:
        transform(lambda x: layer(x.reshape(-1, DIM)).sum())(torch.randn(3, DIM))
    assert solves[0].solution.value.isfinite().all()
    assert "completed" in repr(solves[0].solution)
    assert "completed" in repr(solves)


def test_recording_keeps_no_graph() -> None:
    layer = ImplicitLayer(Cell())
    with deqlib.record(values=True) as solves:
        layer(torch.randn(3, DIM, requires_grad=True)).sum().backward()
    for solve in solves:
        assert solve.solution.value.grad_fn is None


def test_the_table_has_a_row_for_each_layer_and_pass() -> None:
    net = model()
    with deqlib.record() as solves:
        for _ in range(3):
            net(torch.randn(3, DIM)).sum().backward()
    head, *rows = repr(solves).splitlines()
    assert head.split() == ["layer", "kind", "solves", "mean", "nfe", "most", "nfe", "residual", "samples"]
    assert [row.split()[:3] for row in rows] == [
        ["0", "forward", "3"],
        ["0", "adjoint", "3"],
        ["2", "forward", "3"],
    ]
    assert all(row.endswith("9 converged") for row in rows)
    evaluations = [solve.solution.nfe for solve in solves if passes([solve]) == [("0", "adjoint")]]
    assert rows[1].split()[3:5] == [f"{sum(evaluations) / 3:.1f}", str(max(evaluations))]
    assert repr(RecordedSolves()) == str(RecordedSolves()) == "no solves"


@given(
    name=st.text("ab.", min_size=1, max_size=200),
    kind=st.text("xy", min_size=1, max_size=60),
    codes=st.lists(st.sampled_from([s for s in Status if s != Status.COMPLETED]), max_size=30),
    measured=st.booleans(),
)
def test_no_line_of_the_table_is_over_100_columns(
    name: str, kind: str, codes: list[Status], measured: bool
) -> None:
    solution = fixed_point(lambda z: 0.5 * z, torch.zeros(len(codes), 2), backward=JFB())
    status = torch.tensor([int(code) for code in codes], dtype=torch.int64)
    residual = torch.full((len(codes),), 1e-123, dtype=torch.float64) if measured else None
    solution = replace(solution, status=status, relative_residual=residual, nfe=1234567)
    solves = RecordedSolves([RecordedSolve(name, kind, solution)] * 3 + [RecordedSolve("a", "b", solution)])
    lines = repr(solves).splitlines()
    assert max(map(len, lines)) <= 100
    for code in set(codes):
        assert code.name.lower() in repr(solves)


@pytest.mark.parametrize("values", ["yes", 1, None])
def test_values_must_be_a_bool(values: Any) -> None:
    with pytest.raises(TypeError, match="record: values must be True or False, got"):
        deqlib.record(values=values).__enter__()


def test_long_names_of_two_layers_stay_apart_and_one_record_is_a_line() -> None:
    solution = deqlib.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    names = [f"encoder.stages.0.attention.{i}.equilibrium.layers.0.core" for i in (3, 4)]
    solves = deqlib.RecordedSolves(deqlib.RecordedSolve(name, "forward", solution) for name in names)
    rows = repr(solves).splitlines()
    assert max(map(len, rows)) <= 100
    cells = "".join(row[:28].strip() for row in rows[1:])
    assert all(name in cells for name in names)
    for one in (*solves, deqlib.RecordedSolve(names[0] * 3, "forward", solution)):
        assert len(repr(one)) <= 100


def test_records_are_copied_and_pickled_with_their_table() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with deqlib.record(values=True) as solves:
        deqlib.ImplicitLayer(lambda z, x: 0.5 * z + x)(x).sum().backward()
    for twin in (copy.deepcopy(solves), pickle.loads(pickle.dumps(solves)), copy.copy(solves)):
        assert isinstance(twin, deqlib.RecordedSolves)
        assert repr(twin) == repr(solves)
        assert torch.equal(twin[0].solution.value, solves[0].solution.value)

"""Going on with what an earlier solve learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deqlib import (
    Anderson,
    Auto,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    Solver,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.solvers.secant import SecantSolver
from deqlib.testing import linear, mixed_difficulty, nearly_singular, tanh_rnn

SECANT = {"anderson": Anderson(), "anderson I": Anderson(kind="I"), "broyden": Broyden(memory=12)}


def solve(base: Any, solver: Solver, x: Tensor, z0: Tensor, **settings: Any) -> Any:
    with torch.no_grad():
        return fixed_point(
            base.cell,
            z0,
            (x, *base.inputs[1:]),
            solver=solver,
            stopping=Stopping(rtol=1e-6, max_steps=200),
            on_failure="raise",
            **settings,
        )


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", [*SECANT, "auto"])
def test_a_resumed_solve_needs_fewer_steps_than_one_from_the_old_value(name: str, compact: bool) -> None:
    solver = {**SECANT, "auto": Auto()}[name]
    base = nearly_singular(batch=6, width=32, gap=1e-3, dtype=torch.float64)
    first = solve(base, solver, base.inputs[0], base.z0, compact=compact)
    moved = base.inputs[0] + 1e-3 * torch.randn(
        base.z0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    old = solve(base, solver, moved, first.value)
    resumed = solve(base, solver, moved, first.value, state=first.state)
    assert resumed.nfe < old.nfe
    torch.testing.assert_close(resumed.value, old.value, rtol=1e-2, atol=1e-2)
    again = solve(base, solver, moved, first.value, state=first.state)
    assert torch.equal(again.value, resumed.value)  # the state was not used up


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", SECANT)
def test_what_was_learnt_of_a_sample_that_finished_early_is_not_overwritten(name: str, compact: bool) -> None:
    solver = SECANT[name]
    base = mixed_difficulty(batch=6, width=24, easy=0.3, hard=0.9, num_hard=2, dtype=torch.float64)
    state = solve(base, solver, base.inputs[0], base.z0, compact=compact).state
    kept = solver.resume(state, base.z0).history
    _, rates, basis = base.inputs
    found = kept.columns()
    # The easy samples took 11 steps or so, and the hard ones many more: all must have full histories.
    assert (found.sum(1) >= min(solver.memory, 8) - 1).all()
    # The map is linear, so every column that is kept must obey it.
    left = kept.left if not kept.uses_residuals else kept.df - kept.left
    expected = rates.unsqueeze(2) * (left @ basis)
    torch.testing.assert_close(kept.df[found], expected[found], rtol=1e-8, atol=1e-12)
    dr = kept.left if kept.uses_residuals else kept.df - kept.left
    inner = kept.left @ dr.mT
    pairs = found.unsqueeze(1) & found.unsqueeze(2)
    sizes = kept.left.norm(dim=2)
    scale = (sizes.unsqueeze(1) * sizes.unsqueeze(2)).where(pairs, 1.0)
    if isinstance(solver, Broyden):  # of two columns, the newer is a row: there dF stands for dR
        newer = (kept.left @ kept.df.mT - kept.system.matrix).abs() < (inner - kept.system.matrix).abs()
        assert (newer ^ newer.mT ^ torch.eye(solver.memory, dtype=torch.bool))[pairs].all()
        inner = torch.where(newer, kept.left @ kept.df.mT, inner)
    torch.testing.assert_close((kept.system.matrix / scale)[pairs], (inner / scale)[pairs], rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [Anderson(ridge=0.0), Anderson(kind="I", ridge=0.0)], ids=["II", "I"])
@pytest.mark.parametrize("old", SECANT.values(), ids=SECANT)
def test_a_history_is_handed_from_one_method_to_another(old: SecantSolver, new: SecantSolver) -> None:
    base = linear([0.9, -0.7, 0.5, 0.3, -0.1], batch=2, dtype=torch.float64)
    z, state = base.z0, old.init(base.z0)
    for _ in range(6):  # enough columns to span the space: the next step ends the problem
        z, state = old.step(z, base.f(z), state)
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_next, _ = new.step(z, base.f(z), new.resume(state, z))
    torch.testing.assert_close(z_next, base.solution, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("old", SECANT.values(), ids=SECANT)
def test_broyden_goes_on_with_the_pairs_of_another_method(old: SecantSolver) -> None:
    base = linear([0.9, -0.7, 0.5, 0.3, -0.1], batch=1, dtype=torch.float64)
    z, state = base.z0, old.init(base.z0)
    images, points = [], []
    for _ in range(5):
        points.append(z[0])
        images.append(base.f(z)[0])
        z, state = old.step(z, base.f(z), state)
    b = -torch.eye(5, dtype=torch.float64)
    for k in range(4):
        dz = points[k + 1] - points[k]
        dr = images[k + 1] - images[k] - dz
        b = b + torch.outer(dz - b @ dr, dz @ b) / (dz @ b @ dr)
    new = Broyden()
    z_next, _ = new.step(z, base.f(z), new.resume(state, z))
    torch.testing.assert_close(z_next[0], z[0] - b @ (base.f(z) - z)[0], rtol=1e-6, atol=1e-8)


def test_the_newest_columns_are_kept_where_there_is_less_room() -> None:
    base = linear(torch.linspace(-0.9, 0.9, 12), batch=2, dtype=torch.float64)
    old, new = Anderson(memory=6), Anderson(memory=2)
    z, state = base.z0, old.init(base.z0)
    for _ in range(9):
        z, state = old.step(z, base.f(z), state)
    resumed = new.resume(state, z)
    old_history, history = state.history, resumed.history
    newest = (old_history.count - 1) % 6
    assert torch.equal(history.df[:, 1], old_history.df[:, newest])
    assert torch.equal(history.df[:, 0], old_history.df[:, (newest - 1) % 6])
    assert history.count == 2
    assert history.columns().all()


def test_an_empty_history_may_be_handed_on() -> None:
    base = linear([0.5, 0.2], dtype=torch.float64)
    for old in SECANT.values():
        for new in SECANT.values():
            state = new.resume(old.init(base.z0), base.z0)
            assert torch.equal(new.step(base.z0, base.f(base.z0), state)[0], base.f(base.z0))


@pytest.mark.parametrize("solver", SECANT.values(), ids=SECANT)
def test_the_steps_of_a_resumed_solve_can_be_differentiated(solver: Solver) -> None:
    base = tanh_rnn(batch=2, width=4, rate=0.8, dtype=torch.float64)
    first = solve(base, solver, base.inputs[0], base.z0)

    def value(x: Tensor) -> Tensor:
        settings = {"solver": solver, "stopping": Stopping.steps(3), "backward": Unroll()}
        return fixed_point(base.cell, base.z0, (x, *base.inputs[1:]), state=first.state, **settings).value

    assert torch.autograd.gradcheck(value, base.inputs[0].clone().requires_grad_())


def test_solvers_without_memory_start_afresh() -> None:
    base = linear([0.5, 0.2], dtype=torch.float64)
    for solver in (Picard(), NewtonKrylov(memory=2)):
        first = solve(base, solver, base.inputs[0], base.z0)
        resumed = solve(base, solver, base.inputs[0], base.z0, state=first.state)
        assert torch.equal(first.value, resumed.value)


def test_a_layer_resumes_a_pytree_state() -> None:
    layer = ImplicitLayer(lambda z, x: {"a": 0.9 * torch.sin(z["a"]) + x}, init=lambda x: {"a": 0 * x})
    x = torch.randn(3, 5)
    first = layer.solve(x)
    resumed = layer.solve(x + 1e-4, z0=first.value, state=first.state)
    assert resumed.nfe < first.nfe


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (3, "expected the state of a solve by Anderson or Broyden, got int"),
        (NewtonKrylov().init(torch.zeros(4, 8)), "by Anderson or Broyden, got NewtonKrylovState"),
        (
            Anderson().init(torch.zeros(3, 8)),
            r"expected the state of a solve of \(4, 8\) \(batch, numbers a sample\) in torch.float32, "
            r"got one of \(3, 8\) in torch.float32; leave it out to start afresh",
        ),
        (Broyden().init(torch.zeros(4, 7)), r"got one of \(4, 7\) in torch.float32"),
        (Anderson().init(torch.zeros(4, 8).double()), "in torch.float64; leave it out to start afresh"),
    ],
)
@pytest.mark.parametrize("solver", SECANT.values(), ids=SECANT)
def test_a_state_of_another_solve_is_refused(solver: Solver, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(4, 8), solver=solver, state=state)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Broyden(), Broyden(memory=10)),
        (Broyden(memory=4), Broyden()),
        (Broyden(), Anderson()),
        (Anderson(memory=3), Anderson(kind="I")),
        (Anderson(kind="I"), Anderson()),
    ],
)
def test_a_solve_goes_on_with_the_history_of_another_method_or_memory(old: Solver, new: Solver) -> None:
    base = nearly_singular(batch=3, width=12, gap=1e-2, dtype=torch.float64)
    first = solve(base, old, base.inputs[0], base.z0)
    fresh = solve(base, new, base.inputs[0] + 1e-3, first.value)
    resumed = solve(base, new, base.inputs[0] + 1e-3, first.value, state=first.state)
    assert resumed.num_steps.sum() < fresh.num_steps.sum()
    assert resumed.state.history.memory == fresh.state.history.memory
    torch.testing.assert_close(resumed.value, fresh.value, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "solver",
    [Auto(), Auto(plain_steps=0), Anderson(), Anderson(memory=4), Broyden(), Broyden(memory=6)],
    ids=["auto", "auto without plain steps", "anderson", "anderson 4", "broyden", "broyden 6"],
)
def test_a_sample_goes_on_in_company_as_it_does_alone(solver: Solver, compact: bool) -> None:
    # Histories end at different steps, some full and some not. The cell adds up every row by itself, so that
    # rounding is that of the sample alone.
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    gain = torch.tensor([[1.5], [1.5], [0.2], [0.3], [2.0], [1.0]], dtype=torch.float64)
    x, rule = torch.randn(6, 12, dtype=torch.float64), Stopping(rtol=1e-6, max_steps=150)

    def cell(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        return gain * torch.tanh(3 * (z.unsqueeze(1) * matrix).sum(-1)) + x

    def run(rows: slice, start: Tensor, shift: float, **settings: Any) -> Any:
        inputs = (x[rows] + shift, gain[rows])
        return fixed_point(
            cell, start[rows], inputs, solver=solver, stopping=rule, on_failure="ignore", **settings
        )

    everyone = slice(0, 6)
    first = run(everyone, torch.zeros_like(x), 0.0, compact=compact)
    assert len(set(first.num_steps.tolist())) > 3
    together = run(everyone, first.value, 0.05, state=first.state)
    for index in range(6):
        own = slice(index, index + 1)
        state = run(own, torch.zeros_like(x), 0.0).state
        alone = run(own, first.value, 0.05, state=state)
        assert alone.num_steps[0] == together.num_steps[index]
        torch.testing.assert_close(alone.value[0], together.value[index], rtol=1e-7, atol=1e-9)

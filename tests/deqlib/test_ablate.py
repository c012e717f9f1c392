from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import problem
from torch import Tensor, nn

from deqlib import (
    GMRES,
    JFB,
    AdjointStart,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
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
from deqlib.diagnostics import (
    Ablation,
    BackwardRow,
    GradientReport,
    SolveReport,
    SolverRow,
    ablate,
    diagnose,
)
from deqlib.diagnostics.timing import interleaved_times
from deqlib.testing import linear
from deqlib.testing.problems import two_cycle

TIGHT = Stopping(rtol=1e-13, max_steps=400, patience=None)
SOLVERS: list[Solver] = [
    Picard(),
    Picard(damping=0.5),
    Anderson(),
    Broyden(),
    NewtonKrylov(),
    GMRES(),
    Auto(),
]
MODES: list[Backward] = [
    JFB(),
    PhantomGradient(steps=2),
    SharedInverse(),
    ImplicitDifferentiation(),
    Unroll(),
]


class Cell(nn.Module):
    """tanh(z W + x), W a multiple of an orthogonal matrix."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)
        self.double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def inputs(batch: int = 4, width: int = 6) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(scope="module")
def usual() -> Ablation:
    torch.manual_seed(0)
    return ablate(ImplicitLayer(Cell(), solver=Anderson(), backward=JFB()), inputs(), rounds=3)


# Solvers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_solver_rows_are_those_of_direct_solves(rate: float) -> None:
    base = linear([rate, 0.3, -rate / 2, 0.1], dtype=torch.float64)
    rule = Stopping(rtol=1e-7, max_steps=30, patience=None)
    found = ablate(
        ImplicitLayer(base.cell, stopping=rule), *base.inputs, solvers=SOLVERS, backwards=(), rounds=1
    )
    assert found.stopping == rule
    for row, solver in zip(found.solvers, SOLVERS, strict=True):
        with torch.no_grad():
            direct = fixed_point(
                base.cell, base.z0, base.inputs, solver=solver, stopping=rule, on_failure="ignore"
            )
        assert direct.relative_residual is not None
        assert direct.trace is not None
        assert (row.solver, row.samples) == (solver, 4)
        assert row.evaluations == direct.nfe == len(row.curve)
        assert row.converged == int(direct.converged.sum())
        assert row.residual == float(direct.relative_residual.max())
        assert row.curve == tuple(direct.trace.amax(1).tolist())


def test_picard_takes_as_many_evaluations_as_its_rate_says() -> None:
    # From zero, f(z) = z / 2 + x has relative residuals 1, 1/3, 1/7, 1/15, ...: 1 / (2^n - 1).
    layer = ImplicitLayer(lambda z, x: 0.5 * z + x)
    found = ablate(layer, inputs(), solvers=[Picard()], backwards=(), rtol=1.5e-2, rounds=1)
    (row,) = found.solvers
    assert row.evaluations == 7
    assert row.curve == pytest.approx([1 / (2**n - 1) for n in range(1, 8)])
    assert (row.converged, row.outcome) == (4, "4 converged")


def test_a_solver_that_fails_is_a_row_like_any_other() -> None:
    base = two_cycle(dtype=torch.float64)
    layer = ImplicitLayer(base.cell, solver=Anderson())
    found = ablate(layer, *base.inputs, solvers=[Picard(), Anderson()], backwards=(), rounds=1)
    picard, anderson = found.solvers
    assert (picard.converged, anderson.converged) == (0, 4)
    assert picard.residual > 0.5
    assert "stalled" in picard.outcome


def test_samples_that_reach_the_tolerance_are_counted_one_by_one() -> None:
    speed = torch.tensor([0.1, 0.2, 3.0, 0.3], dtype=torch.float64).unsqueeze(1)
    layer = ImplicitLayer(lambda z, x, speed: speed * z + x)
    found = ablate(layer, inputs(), speed, solvers=[Picard()], backwards=[JFB()], rounds=1)
    assert (found.solvers[0].converged, found.solvers[0].samples) == (3, 4)
    assert found.notes == ()  # the tight solve goes on by any method and finds all four


# Backward modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, -0.8])
def test_errors_on_a_scaled_identity_are_known(rate: float) -> None:
    """With J = r I the exact adjoint is g / (1 - r), that of JFB g, and a phantom one lies between."""
    layer = ImplicitLayer(lambda z, x: rate * z + x, solver=Picard(), stopping=TIGHT)
    modes: list[Backward] = [JFB(), PhantomGradient(steps=3, damping=0.5, form="neumann")]
    jfb, phantom = ablate(layer, inputs(), backwards=modes, solvers=(), rounds=1).backwards
    assert jfb.input_cosine == pytest.approx(1)
    assert jfb.input_error == pytest.approx(abs(rate))
    assert jfb.cosine is jfb.error is None
    assert phantom.input_error == pytest.approx((0.5 * rate + 0.5) ** 3)


@given(
    spectrum=st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=7), non_normality=st.sampled_from([0.0, 0.5])
)
def test_errors_of_a_linear_cell_are_those_of_dense_algebra(
    spectrum: list[float], non_normality: float
) -> None:
    base = linear(spectrum, non_normality=non_normality, dtype=torch.float64)
    x, matrix = base.inputs[0], base.inputs[1].clone().requires_grad_()
    layer = ImplicitLayer(lambda z, x: z @ matrix + x, solver=Anderson(), stopping=TIGHT)
    mode = ImplicitDifferentiation(stopping=TIGHT)
    jfb, exact = ablate(layer, x, backwards=[JFB(), mode], solvers=(), rounds=1).backwards
    # The direction is drawn as documented: normal, of a generator of seed 0, in float32.
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    weight = matrix.detach()
    eye = torch.eye(len(weight), dtype=torch.float64)
    u = torch.linalg.solve(eye - weight, g.mT).mT  # u (I - A^T) = g
    z = torch.linalg.solve((eye - weight).mT, x.mT).mT
    assert jfb.input_cosine == pytest.approx(float((g * u).sum() / (g.norm() * u.norm())), rel=1e-6)
    assert jfb.input_error == pytest.approx(float((g - u).norm() / u.norm()), rel=1e-6, abs=1e-9)
    ours, theirs = z.mT @ g, z.mT @ u
    assert jfb.cosine == pytest.approx(float((ours * theirs).sum() / (ours.norm() * theirs.norm())), rel=1e-6)
    assert jfb.error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-6, abs=1e-9)
    assert jfb.worst_error == max(jfb.error or 0, jfb.input_error or 0)
    # Not to the root of a rounding error, as a cosine would tell it.
    assert exact.worst_error < 1e-10


def test_exact_modes_have_no_error_and_cheap_ones_agree_with_diagnose() -> None:
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell(), solver=Anderson(), stopping=TIGHT)
    modes = [ImplicitDifferentiation(stopping=TIGHT), Unroll(), JFB(), PhantomGradient()]
    found = ablate(layer, inputs(), backwards=modes, solvers=(), rounds=1)
    exact, unrolled, *cheap = found.backwards
    assert max(exact.worst_error, unrolled.worst_error) < 1e-9
    reports = diagnose(layer, inputs(), modes=(), num_starts=0, solvers=()).gradients
    assert reports[0].saved_bytes == exact.saved_bytes
    for row in cheap:
        assert row.error is not None
        assert row.cosine is not None
        assert 0.01 < row.error < 1
        assert row.cosine < 0.999
    assert unrolled.saved_bytes > 10 * exact.saved_bytes > 0
    assert (cheap[0].evaluations, cheap[0].products) == (1, 1)
    assert cheap[1].saved_bytes == 5 * cheap[0].saved_bytes


def test_modes_run_with_the_layers_solver_and_else_with_one_they_take() -> None:
    modes = [JFB(), SharedInverse(), Reversible()]
    layer = ImplicitLayer(Cell(), solver=Picard())
    found = ablate(layer, inputs(), solvers=[Anderson()], backwards=modes, rounds=1)
    assert [row.solver for row in found.backwards] == [Picard(), Broyden(), ReversiblePicard()]
    assert "Reversible, by ReversiblePicard" in str(found)
    assert "JFB, by" not in str(found)
    assert found.backwards[2].worst_error < 0.05


def test_a_cell_without_gradient_or_fixed_point_is_measured_too(tmp_path: Path) -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            return 0.5 * z + x

    found = ablate(ImplicitLayer(cell), inputs(), rounds=1)
    assert all(row.error is row.input_error is None for row in found.backwards)
    assert math.isnan(found.backwards[0].worst_error)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "none.png")
    drift = ablate(ImplicitLayer(lambda z, x: z + x), inputs(), backwards=[JFB()], solvers=(), rounds=1)
    assert "no fixed point was found for 4 of 4" in drift.notes[0]
    assert "the exact gradient is not known" in drift.notes[1]
    assert f"note: {drift.notes[0]}" in str(drift)


def test_rows_are_the_reports_of_a_diagnosis_with_times(usual: Ablation) -> None:
    assert (SolverRow, BackwardRow) == (SolveReport, GradientReport)
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell(), solver=Anderson(), backward=JFB())
    found = diagnose(layer, inputs(), num_starts=0, rounds=0)
    anderson, jfb = found.solvers[0], found.gradients[0]
    row, mode = usual.solvers[0], usual.backwards[0]
    assert torch.equal(anderson.trace, row.trace)
    assert (anderson.evaluations, anderson.outcome) == (row.evaluations, row.outcome)
    assert (jfb.evaluations, jfb.products, jfb.saved_bytes) == (
        mode.evaluations,
        mode.products,
        mode.saved_bytes,
    )
    assert len(row.times) == len(mode.times) == 3
    assert anderson.times == jfb.times == ()
    assert math.isnan(anderson.seconds)
    assert anderson.record()["seconds"] is jfb.record()["seconds"] is None


# The rule, the defaults, the order -----------------------------------------------------------------------


def test_the_rule_is_the_layers_unless_asked_otherwise() -> None:
    def rule(stopping: Stopping, **asked: Any) -> Stopping:
        layer = ImplicitLayer(Cell(), stopping=stopping)
        return ablate(layer, inputs(), solvers=(), backwards=(), rounds=1, **asked).stopping

    own = Stopping(rtol=1e-5, max_steps=70, norm_axes=(-1,))
    assert rule(own) == own
    assert rule(own, rtol=1e-2) == Stopping(rtol=1e-2, max_steps=70, norm_axes=(-1,))
    assert rule(own, max_steps=9) == Stopping(rtol=1e-5, max_steps=9, norm_axes=(-1,))
    assert rule(Stopping.steps(7)) == Stopping()
    assert rule(Stopping.steps(7), rtol=1e-6, max_steps=12) == Stopping(rtol=1e-6, max_steps=12)


def test_modes_follow_the_rule_too() -> None:
    layer = ImplicitLayer(Cell(), solver=Picard(), backward=Unroll())
    (row,) = ablate(layer, inputs(), solvers=(), backwards=[Unroll()], max_steps=3, rounds=1).backwards
    assert row.evaluations == 4


def test_the_layers_own_come_first_by_default_and_once(usual: Ablation) -> None:
    assert [row.solver for row in usual.solvers] == [
        Anderson(),
        Auto(),
        Broyden(),
        NewtonKrylov(),
        Picard(),
    ]
    assert usual.backwards[0].mode == JFB()
    assert len({row.name for row in usual.backwards}) == len(usual.backwards) == 6


@given(
    solvers=st.lists(st.sampled_from(SOLVERS), max_size=4),
    backwards=st.lists(st.sampled_from(MODES), max_size=3),
    rounds=st.integers(1, 2),
)
def test_rows_come_in_the_order_asked_and_survive_json(
    solvers: list[Solver], backwards: list[Backward], rounds: int
) -> None:
    base = problem("tanh", batch=2, dim=3)
    layer = ImplicitLayer(lambda z, x: base.cell(z, x, *base.inputs[1:]))
    found = ablate(layer, base.inputs[0], solvers=solvers, backwards=backwards, rounds=rounds)
    assert [row.solver for row in found.solvers] == solvers
    assert [row.mode for row in found.backwards] == backwards
    assert all(len(row.times) == rounds for row in (*found.solvers, *found.backwards))
    records = json.loads(json.dumps(found.records(), allow_nan=False))
    assert records == found.records()
    assert [record["settings"] for record in records] == [repr(one) for one in (*solvers, *backwards)]
    assert [record["kind"] for record in records] == ["solver"] * len(solvers) + ["backward"] * len(backwards)
    for record, row in zip(records, (*found.solvers, *found.backwards), strict=True):
        assert (record["seconds"], tuple(record["times"])) == (row.seconds, row.times)


def test_what_is_not_finite_is_null_in_json() -> None:
    x = inputs()
    x[1] = math.nan
    found = ablate(ImplicitLayer(Cell()), x, solvers=[Picard()], backwards=[JFB()], rounds=1)
    solver, backward = json.loads(json.dumps(found.records(), allow_nan=False))
    assert (found.solvers[0].residual, solver["residual"]) == (math.inf, None)
    assert (backward["cosine"], backward["error"]) == (None, None)
    assert solver["converged"] == 3


# What it must work with ----------------------------------------------------------------------------------


def test_states_of_several_tensors() -> None:
    inner = Cell()

    def cell(z: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
        a = inner(z["a"], x["a"])
        return {"a": a, "b": 0.3 * torch.cos(z["b"]) + x["b"] * a.sum(1)}

    x = {"a": inputs(), "b": torch.rand(4).double()}
    found = ablate(ImplicitLayer(cell, stopping=TIGHT), x, backwards=[Unroll()], rounds=1)
    assert (found.batch, found.width, found.dtype, found.device.type) == (4, 7, torch.float64, "cpu")
    assert found.backwards[0].worst_error < 1e-9


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_callers_gradient_mode_makes_no_difference(mode: Any) -> None:
    layer = ImplicitLayer(Cell())

    def facts() -> list[dict[str, Any]]:
        records = ablate(layer, inputs(), rounds=1).records()
        return [{k: v for k, v in r.items() if "seconds" not in k and k != "times"} for r in records]

    expected = facts()
    with mode():
        assert facts() == expected
        assert not torch.is_grad_enabled()


def test_under_autocast_the_type_is_that_of_the_cell() -> None:
    layer = ImplicitLayer(Cell().float(), solver=Anderson(), stopping=Stopping(rtol=2e-2))
    with torch.autocast("cpu", torch.bfloat16):
        found = ablate(layer, inputs().float(), backwards=[ImplicitDifferentiation(), JFB()], rounds=1)
    assert found.dtype == torch.bfloat16
    assert found.backwards[0].worst_error < 0.1 < found.backwards[1].worst_error


class Restless(Cell):
    """Keeps statistics and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(z, x) + 0.05 * self.norm(x) + 0.01 * torch.rand(()).double()


def test_the_layer_and_random_numbers_are_left_as_they_were() -> None:
    start, generator = AdjointStart(), torch.Generator().manual_seed(7)
    own = ImplicitDifferentiation(warm_start=start)
    layer = ImplicitLayer(Restless(), solver=Anderson(), backward=own, on_failure="ignore").train()
    layer.cell.linear.bias.requires_grad_(False)
    layer.cell.linear.weight.grad = torch.ones_like(layer.cell.linear.weight)
    modules = [module.training for module in layer.modules()]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    settings = (layer.solver, layer.backward, layer.stopping)
    calls, x = layer.cell.calls, inputs().requires_grad_()
    upstream = 2 * x
    random, drawn = torch.get_rng_state(), generator.get_state()
    modes = [own, Unroll(), JFB(), StochasticJFB(generator=generator)]
    found = ablate(layer, upstream, backwards=modes, rounds=2)
    assert [row.mode for row in found.backwards] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), drawn)
    assert start._last is None
    assert [module.training for module in layer.modules()] == modules
    assert (layer.solver, layer.backward, layer.stopping) == settings
    assert layer.cell.calls is calls
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    assert bool((layer.cell.linear.weight.grad == 1).all())
    assert layer.cell.linear.bias.grad is None
    assert x.grad is None
    upstream.sum().backward()  # the caller's graph is still there


def test_contenders_take_turns_and_a_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: seen.append(str(device)))

    def contender(name: str) -> Callable[[], object]:
        return lambda: seen.append(name)

    times = interleaved_times([contender("a"), contender("b")], 2, torch.device("cuda", 0))
    assert seen == ["cuda:0", "a", "cuda:0", "cuda:0", "b", "cuda:0"] * 2
    assert [len(seconds) for seconds in times] == [2, 2]
    assert all(second >= 0 for seconds in times for second in seconds)
    seen.clear()
    interleaved_times([contender("a")], 1, torch.device("cpu"))
    assert seen == ["a"]


def test_every_contender_is_run_once_before_it_is_timed() -> None:
    calls = []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return 0.5 * z + x

    found = ablate(ImplicitLayer(cell), inputs(), solvers=[Picard()], backwards=(), rounds=2)
    assert len(calls) == 3 * found.solvers[0].evaluations


# Bad arguments -------------------------------------------------------------------------------------------


class _NeedsAnother(JFB):
    def check(self, solver: Solver, stopping: Stopping) -> None:
        raise ValueError("none will do")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"solvers": Picard()}, TypeError, "solvers must be a list or tuple, got Picard"),
        ({"solvers": ["picard"]}, TypeError, r"solvers\[0\] must be a deqlib solver"),
        ({"backwards": JFB()}, TypeError, "backwards must be a list or tuple, got JFB"),
        ({"backwards": [JFB(), Picard()]}, TypeError, r"backwards\[1\] must be a deqlib backward"),
        ({"backwards": [_NeedsAnother()]}, ValueError, "backwards must work with .*: none will do"),
        ({"rtol": -1}, ValueError, "rtol must be in"),
        ({"rtol": "tight"}, TypeError, "rtol must be a number"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"rounds": 2.0}, TypeError, "rounds must be an int"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^ablate: {words}"):
        ablate(ImplicitLayer(Cell()), inputs(), **arguments)


def test_a_layer_is_asked_for_and_at_least_one_number() -> None:
    with pytest.raises(TypeError, match=r"ablate: layer must be a deqlib\.ImplicitLayer"):
        ablate(Cell(), inputs())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ablate: .*at least one number, got 0 samples of 6"):
        ablate(ImplicitLayer(Cell()), inputs(0))


# Shown ---------------------------------------------------------------------------------------------------


def test_the_text_holds_both_tables_in_aligned_columns(usual: Ablation) -> None:
    text = str(usual)
    assert text == usual.summary()
    head, solvers, backwards = text.split("\n\n")
    assert head == "4 samples of 6 numbers, float64 on cpu, relative residual 1e-03 within 50 steps"
    for table, rows in ((solvers, usual.solvers), (backwards, usual.backwards)):
        lines = table.splitlines()
        assert len(lines) == 1 + len(rows)
        assert len({len(line) for line in lines}) == 1
        for line, row in zip(lines[1:], rows, strict=True):
            assert line.startswith(row.name)
    assert f" {usual.solvers[0].evaluations} " in solvers.splitlines()[1]


def test_the_plot_draws_residuals_and_errors_against_every_cost(usual: Ablation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = usual.plot(tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    by_evaluations, by_time, errors_by_time, errors_by_memory = (
        {line.get_label(): line for line in axes.get_lines()} for axes in figure.axes
    )
    for row in usual.solvers:
        for lines, last in ((by_evaluations, row.evaluations), (by_time, 1e3 * row.seconds)):
            name = row.name + " (layer)" * (row.solver == Anderson())
            assert list(lines[name].get_ydata()) == pytest.approx(row.curve)
            assert lines[name].get_xdata()[-1] == pytest.approx(last)
    for mode in usual.backwards:
        for lines, cost in ((errors_by_time, 1e3 * mode.seconds), (errors_by_memory, mode.saved_bytes / 1e3)):
            (place,) = lines[mode.name + " (layer)" * (mode.mode == JFB())].get_xydata()
            assert list(place) == pytest.approx([cost, mode.worst_error])


def test_without_matplotlib_the_plot_says_what_to_install(
    usual: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Ablation\.plot: .*matplotlib.*pip install 'deqlib\[plot\]'"):
        usual.plot()

from __future__ import annotations

import math
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import dense_gradients, dense_jacobian, problem, solution_of
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Solution,
    Solver,
    Status,
    StochasticJFB,
    Stopping,
    Unroll,
)
from deqlib.diagnostics import Diagnosis, diagnose, metrics
from deqlib.diagnostics.experiment import Experiment
from deqlib.diagnostics.krylov import spectral_norm, spectral_radius
from deqlib.diagnostics.metrics.gradients import GradientComparison
from deqlib.diagnostics.metrics.paths import PathReport
from deqlib.diagnostics.metrics.spectrum import SpectrumReport
from deqlib.diagnostics.reports import MetricReport
from deqlib.diagnostics.settings import labels
from deqlib.testing import linear
from deqlib.testing.problems import explosion, two_cycle

TIGHT = Stopping(rtol=1e-12, max_steps=400, patience=None)


class Cell(nn.Module):
    """tanh(z W + x), W a multiple of an orthogonal matrix."""

    def __init__(self, width: int = 6, gain: float = 0.7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, gain=gain)
        self.to(dtype)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def inputs(batch: int = 4, width: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def bistable(z: Tensor, x: Tensor) -> Tensor:
    """Two stable fixed points, near +1 and near -1, in every number."""
    return torch.tanh(3 * z + 0.1 * x)


@pytest.fixture(scope="module")
def healthy() -> Diagnosis:
    torch.manual_seed(0)
    return diagnose(ImplicitLayer(Cell(), solver=Anderson()), inputs())


def says(found: Diagnosis, words: str) -> bool:
    return any(re.search(words, line) for line in found.suggestions)


# Spectra against dense linear algebra -------------------------------------------------------------------


def dense_radius(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvals(matrices).abs().amax(1)


@given(
    dim=st.integers(1, 14),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_spectra_are_exact_where_the_products_span_the_space(
    dim: int, batch: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)
    start = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    product = lambda v: (a @ v.unsqueeze(2)).squeeze(2)  # noqa: E731
    transposed = lambda v: (a.mT @ v.unsqueeze(2)).squeeze(2)  # noqa: E731
    radius = spectral_radius(product, start, 14)
    torch.testing.assert_close(radius, dense_radius(a), rtol=1e-6, atol=0)
    norm = spectral_norm(product, transposed, start, 14)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(a, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "symmetric", "rotation", "nearly symmetric"])
def test_spectra_of_larger_matrices_are_found_within_a_few_percent(kind: str, dtype: torch.dtype) -> None:
    a = torch.randn(5, 80, 80, dtype=torch.float64) / math.sqrt(80)
    if kind == "symmetric":
        a = a + a.mT
    elif kind == "rotation":  # every eigenvalue is one of a complex pair, all of modulus 0.9
        a = 0.9 * torch.linalg.qr(a)[0]
    elif kind == "nearly symmetric":
        a = a + a.mT + 0.1 * torch.triu(a, 1)
    held = a.to(dtype)
    product = lambda v: (held @ v.unsqueeze(2)).squeeze(2)  # noqa: E731
    transposed = lambda v: (held.mT @ v.unsqueeze(2)).squeeze(2)  # noqa: E731
    start = torch.randn(5, 80, dtype=dtype)
    torch.testing.assert_close(spectral_radius(product, start, 24), dense_radius(a), rtol=0.03, atol=0)
    norm = spectral_norm(product, transposed, start, 12)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(a, 2), rtol=0.02, atol=0)
    assert bool((norm <= torch.linalg.matrix_norm(a, 2) * (1 + 1e-5)).all())


def test_a_complex_pair_that_leads_does_not_make_the_radius_oscillate() -> None:
    angle, a = torch.tensor(1.1, dtype=torch.float64), torch.zeros(1, 40, 40, dtype=torch.float64)
    a[0, :, :] = torch.diag(torch.linspace(-0.5, 0.5, 40, dtype=torch.float64))
    a[0, :2, :2] = 0.8 * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    for seed in range(5):
        start = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(spectral_radius(lambda v: v @ a[0], start, 16)) == pytest.approx(0.8, rel=1e-3)


def test_a_process_that_has_not_settled_goes_on_from_what_it_found() -> None:
    a = torch.randn(9, 60, 60, dtype=torch.float64) / math.sqrt(60)
    product = lambda v: (a @ v.unsqueeze(2)).squeeze(2)  # noqa: E731
    error = spectral_radius(product, torch.randn(9, 60, dtype=torch.float64), 24) / dense_radius(a) - 1
    assert float(error.abs().median()) < 1e-4  # one process alone: 1e-3


def test_a_sample_whose_products_are_not_finite_stays_the_only_one() -> None:
    scale = torch.tensor([[0.5], [math.nan], [math.inf], [0.0]], dtype=torch.float64)
    radius = spectral_radius(lambda v: scale * v, torch.randn(4, 9, dtype=torch.float64), 5)
    assert radius.isnan().tolist() == [False, True, True, False]
    assert radius[[0, 3]].tolist() == pytest.approx([0.5, 0.0])


@given(
    spectrum=st.lists(st.floats(-0.9, 0.9), min_size=2, max_size=9), non_normality=st.sampled_from([0.0, 0.5])
)
def test_of_a_linear_layer_radius_and_norm_are_those_of_its_matrix(
    spectrum: list[float], non_normality: float
) -> None:
    base = linear(spectrum, non_normality=non_normality, dtype=torch.float64)
    layer = ImplicitLayer(base.cell, stopping=TIGHT)
    found = diagnose(layer, *base.inputs, modes=(), solvers=(), num_starts=0)
    norm = float(torch.linalg.matrix_norm(base.inputs[1], 2))
    assert found.batch == 4
    assert found.spectral_norm.tolist() == pytest.approx([norm] * 4, rel=1e-6, abs=1e-9)
    # Eigenvalues far from normal move by the square root of a rounding error.
    radius = float(torch.linalg.eigvals(base.inputs[1]).abs().max())
    assert found.spectral_radius.tolist() == pytest.approx([radius] * 4, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["tanh", "mlp"])
def test_radius_and_norm_are_those_of_the_jacobian_at_each_samples_fixed_point(kind: str) -> None:
    base = problem(kind, batch=3, dim=5, contraction=0.8)
    layer = ImplicitLayer(lambda z, x: base.cell(z, x, *base.inputs[1:]), solver=Picard())
    found = diagnose(layer, base.inputs[0], modes=(), solvers=(), num_starts=0)
    whole = dense_jacobian(base, solution_of(base)).view(3, 5, 3, 5)
    blocks = torch.stack([whole[i, :, i] for i in range(3)])
    torch.testing.assert_close(found.spectral_radius, dense_radius(blocks), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.spectral_norm, torch.linalg.matrix_norm(blocks, 2), rtol=1e-6, atol=0)


class _Halved(torch.autograd.Function):
    """z / 2, differentiable in reverse mode alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z / 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / 2


class _HalvedOnce(_Halved):
    """Once only."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / 2


def test_a_cell_without_forward_mode_is_differentiated_twice_and_that_is_noted() -> None:
    found = diagnose(ImplicitLayer(lambda z, x: _Halved.apply(z) + x), inputs(), modes=())
    assert found.spectral_radius.tolist() == pytest.approx([0.5] * 4)
    assert found.spectral_norm.tolist() == pytest.approx([0.5] * 4)
    assert len(found.notes) == 1
    assert "forward mode" in found.notes[0]


def test_a_cell_that_can_be_differentiated_once_only_has_no_known_norm() -> None:
    found = diagnose(ImplicitLayer(lambda z, x: _HalvedOnce.apply(z) + x), inputs(), modes=())
    assert found.spectral_radius.tolist() == pytest.approx([0.5] * 4)
    assert bool(found.spectral_norm.isnan().all())
    assert "spectral norm is not known" in found.notes[-1]


# Contraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 0.9, 1.5, 3.0])
def test_contraction_is_the_leading_eigenvalue_of_a_linear_layer_converging_or_not(rate: float) -> None:
    base = linear([rate, 0.1 * rate, 0.05 * rate], dtype=torch.float64)
    found = diagnose(ImplicitLayer(base.cell), *base.inputs, modes=(), solvers=(), num_starts=0)
    assert found.contraction.tolist() == pytest.approx([rate] * 4, rel=1e-3)


def test_contraction_cannot_be_told_where_iteration_is_done_at_once_or_not_finite_from_the_start() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return 0 * z + x

    x = inputs(2)
    x[1] = math.nan
    found = diagnose(ImplicitLayer(cell), x, modes=(), solvers=(), num_starts=0)
    assert bool(found.contraction.isnan().all())
    assert found.spectral_radius[0] == 0


def test_contraction_is_infinite_where_iterates_overflow() -> None:
    base = explosion()
    found = diagnose(ImplicitLayer(base.cell), *base.inputs, modes=(), solvers=(), num_starts=0)
    assert bool((found.contraction == math.inf).all())


# Gradients -----------------------------------------------------------------------------------------------


def cosine_and_ratio(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, exact))
    return float(torch.cosine_similarity(a, b, dim=0)), float(a.norm() / b.norm())


@pytest.mark.parametrize("kind", ["tanh", "mlp"])
def test_cosines_and_norm_ratios_are_those_of_dense_gradients(kind: str) -> None:
    base = problem(kind, contraction=0.85).requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    layer = ImplicitLayer(lambda z, x: base.cell(z, x, *base.inputs[1:]), stopping=TIGHT)
    modes = (JFB(), PhantomGradient(steps=3, damping=0.6), ImplicitDifferentiation(stopping=TIGHT))
    x = base.inputs[0]
    found = diagnose(layer, x, modes=modes, loss=lambda z: (g * z).sum(), solvers=(), num_starts=0)

    def phantom(transposed: Tensor, g: Tensor) -> Tensor:
        step = 0.6 * transposed + 0.4 * torch.eye(len(g), dtype=g.dtype)
        return 0.6 * (g + step @ g + step @ step @ g)

    exact = dense_gradients(base, g)
    by_name = {report.name.partition("(")[0]: report for report in found.gradients[1:]}
    for name, adjoint in (("JFB", lambda _, g: g), ("PhantomGradient", phantom)):
        dense, report = dense_gradients(base, g, adjoint), by_name[name]
        cosine, ratio = cosine_and_ratio(list(dense[1:]), list(exact[1:]))
        assert report.cosine == pytest.approx(cosine, rel=1e-6)
        assert report.norm_ratio == pytest.approx(ratio, rel=1e-6)
        cosine, ratio = cosine_and_ratio([dense[0]], [exact[0]])
        assert report.input_cosine == pytest.approx(cosine, rel=1e-6)
        assert report.input_norm_ratio == pytest.approx(ratio, rel=1e-6)
        assert report.worst_cosine == min(report.cosine or 2, report.input_cosine or 2)
    implicit = by_name["ImplicitDifferentiation"]
    assert (implicit.cosine, implicit.norm_ratio) == pytest.approx((1, 1), abs=1e-9)


def test_modes_are_charged_for_what_they_record_and_for_their_products(healthy: Diagnosis) -> None:
    costs = {report.name: (report.evaluations, report.products) for report in healthy.gradients}
    own = costs.pop("ImplicitDifferentiation")
    assert own[0] == 1
    assert own[1] == healthy.adjoint.nfe + 1  # one more for the gradient itself
    assert costs["JFB"] == (1, 1)
    assert costs["PhantomGradient"] == (5, 5)
    assert costs["PhantomGradient(form='neumann')"] == (1, 5)
    kept = {report.name: report.saved_bytes for report in healthy.gradients}
    assert kept["PhantomGradient"] > 4 * kept["JFB"] > 0


def test_the_layers_own_mode_and_solver_come_first_and_once() -> None:
    layer = ImplicitLayer(Cell(), solver=Anderson(memory=3), backward=JFB())
    found = diagnose(layer, inputs(), num_starts=0)
    assert [r.name for r in found.solvers] == [
        "Anderson(memory=3)",
        "Picard",
        "Anderson",
        "Broyden",
    ]
    assert found.gradients[0].mode == JFB()
    assert sum(report.mode == JFB() for report in found.gradients) == 1
    again = diagnose(layer, inputs(), solvers=[Anderson(memory=3)], modes=[JFB(), JFB()], num_starts=0)
    assert len(again.solvers) == len(again.gradients) == 1


class _NeedsBroyden(JFB):
    def check(self, solver: Solver, stopping: Stopping) -> None:
        if not isinstance(solver, Broyden):
            raise ValueError("only Broyden's matrix will do")


class _NeedsAnother(JFB):
    def check(self, solver: Solver, stopping: Stopping) -> None:
        raise ValueError("none will do")


def test_a_mode_that_refuses_the_layers_solver_runs_with_one_that_it_takes() -> None:
    layer = ImplicitLayer(Cell(), solver=Picard())
    found = diagnose(layer, inputs(), modes=(_NeedsBroyden(),), solvers=(), num_starts=0)
    assert found.gradients[1].solver == Broyden()
    assert "_NeedsBroyden, by Broyden" in found.summary()
    good = with_gradient(found, 1, cosine=1.0, input_cosine=1.0)
    assert says(good, "_NeedsBroyden with Broyden is good enough")
    with pytest.raises(ValueError, match=r"modes must work with .*: none will do"):
        diagnose(layer, inputs(), modes=(_NeedsAnother(),))


def test_gradients_of_tensors_that_the_cell_captured_count_and_frozen_ones_do_not() -> None:
    free = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    frozen = torch.full((6,), 0.5, dtype=torch.float64)
    captured = diagnose(ImplicitLayer(lambda z, x: torch.tanh(free * z + x)), inputs())
    assert captured.gradients[0].cosine == pytest.approx(1, abs=1e-5)
    assert free.grad is None
    none = diagnose(ImplicitLayer(lambda z, x: torch.tanh(frozen * z + x)), inputs()).gradients[0]
    assert none.cosine is None
    assert none.input_cosine == pytest.approx(1, abs=1e-5)


def test_inputs_that_are_no_floating_point_tensors_are_passed_as_they_are() -> None:
    cell = Cell()
    index = torch.tensor([3, 2, 1, 0])
    layer = ImplicitLayer(
        lambda z, i, scale: cell(z, scale * inputs()[i]), init=lambda i, scale: torch.zeros(4, 6).double()
    )
    report = diagnose(layer, index, 0.5).gradients[0]
    assert report.input_cosine is None
    assert report.cosine == pytest.approx(1, abs=1e-6)
    assert report.worst_cosine == report.cosine


# Path independence ---------------------------------------------------------------------------------------


def test_a_contraction_is_path_independent(healthy: Diagnosis) -> None:
    assert healthy.path is not None
    assert bool((healthy.path.distance < 1e-10).all())
    assert bool((healthy.path.cosine > 1 - 1e-10).all())
    assert healthy.path.reached.tolist() == [4] * 4
    assert not says(healthy, "different fixed points")


def test_a_cell_with_two_fixed_points_is_found_out() -> None:
    layer = ImplicitLayer(bistable, solver=Picard())
    found = diagnose(layer, inputs(4, 1), num_starts=6)
    assert found.path is not None
    assert found.path.reached.tolist() == [7] * 4
    # Fixed points near +1 and -1: opposite and of nearly one size.
    assert found.path.distance.tolist() == pytest.approx([2.0] * 4, abs=0.02)
    assert found.path.cosine.tolist() == pytest.approx([-1.0] * 4)
    assert says(found, r"different fixed points for 4 of 4 samples")


def test_starts_from_which_nothing_converges_are_not_taken_for_fixed_points() -> None:
    base = two_cycle()
    found = diagnose(ImplicitLayer(base.cell, solver=Picard()), *base.inputs, modes=(), num_starts=2)
    assert found.path is not None
    assert found.path.reached.tolist() == [0] * 4
    assert bool(found.path.distance.isnan().all())


def test_no_starts_no_path_report() -> None:
    found = diagnose(ImplicitLayer(Cell()), inputs(), num_starts=0)
    assert found.path is None
    assert "path" not in found.summary()


# Solves --------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_layers_own_solves(healthy: Diagnosis) -> None:
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell())
    for report in healthy.solvers:
        with torch.no_grad():
            solution: Solution = layer.solve(inputs(), solver=report.solver)
        assert solution.trace is not None
        assert solution.residual is not None
        assert torch.equal(report.worst, solution.trace.amax(1))
        assert torch.equal(report.median, solution.trace.median(1).values)
        assert torch.equal(report.status, solution.status)
        assert report.nfe == solution.nfe == len(report.trace)
    assert healthy.layer is healthy.solvers[0]


def test_a_layer_of_a_fixed_number_of_steps_is_shown_as_it_is_beside_solves_to_a_tolerance() -> None:
    layer = ImplicitLayer(Cell(), solver=Picard(), stopping=Stopping.steps(3))
    found = diagnose(layer, inputs())
    assert found.layer.name == "Picard, 3 steps"
    assert found.layer.status.tolist() == [Status.COMPLETED] * 4
    assert found.layer.nfe == 4
    assert all(report.num_failed == 0 for report in found.solvers)
    assert found.stopping == Stopping()
    assert says(found, "fixed number of steps leaves a relative residual")


@pytest.mark.parametrize("base", [explosion(), two_cycle()], ids=lambda base: base.name)
def test_a_layer_that_fails_is_diagnosed_without_a_warning_or_an_error(base: Any) -> None:
    layer = ImplicitLayer(base.cell, solver=Picard(), on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(layer, *base.inputs)
    assert found.layer.num_failed == 4
    assert says(found, "misses its tolerance for 4 of 4 samples")
    assert says(found, "spectral radius is 1 or more|1 or more for 4 of 4")
    assert str(found)
    found.plot()


def test_a_sample_that_is_not_finite_is_flagged_and_stays_the_only_one() -> None:
    x = inputs()
    layer = ImplicitLayer(Cell(), solver=Anderson())
    whole = diagnose(layer, x)
    x[1] = math.nan
    found = diagnose(layer, x)
    assert says(found, "not finite for 1 of 4 samples")
    assert found.spectral_radius.isnan().tolist() == [False, True, False, False]
    rest = [0, 2, 3]
    torch.testing.assert_close(found.spectral_radius[rest], whole.spectral_radius[rest])
    assert "no fixed point was found for 1 of 4" in found.notes[0]
    found.plot()


def test_a_cell_without_any_gradient_is_diagnosed() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            return 0.5 * z + x

    found = diagnose(ImplicitLayer(cell), inputs())
    assert found.spectral_radius.tolist() == [0] * 4
    assert math.isnan(found.gradients[0].worst_cosine)
    assert found.notes == ("the cell's output carries no gradient",)
    assert found.layer.num_failed == 0


# What it must work with ----------------------------------------------------------------------------------


def test_states_of_several_tensors_and_several_inputs() -> None:
    inner = Cell()

    def cell(z: dict[str, Tensor], x: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        a = inner(z["a"], x["a"]) * scale
        return {"a": a, "b": 0.3 * torch.cos(z["b"]) + x["b"] * a.sum(1)}

    x = {"a": inputs(), "b": torch.rand(4).double()}
    scale = torch.tensor(0.9, dtype=torch.float64)
    found = diagnose(ImplicitLayer(cell), x, scale, loss=lambda z: z["a"].sum() + z["b"].square().sum())
    assert found.width == 7
    assert found.layer.num_failed == 0
    assert found.gradients[0].cosine == pytest.approx(1, abs=1e-5)
    assert found.gradients[0].input_cosine == pytest.approx(1, abs=1e-5)
    assert found.gradients[0].products == found.adjoint.nfe + 1
    assert found.path is not None
    assert bool((found.path.distance < 1e-8).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-3
    rule = Stopping(rtol=rtol)
    layer = ImplicitLayer(Cell(dtype=dtype), stopping=rule, backward=ImplicitDifferentiation(stopping=rule))
    found = diagnose(layer, inputs(dtype=dtype))
    assert found.dtype == dtype
    assert found.layer.num_failed == 0
    assert found.gradients[0].worst_cosine > 0.999
    assert 0.3 < float(found.spectral_radius.max()) < 0.71


def test_under_autocast_the_type_is_that_of_the_cell() -> None:
    layer = ImplicitLayer(Cell(dtype=torch.float32), stopping=Stopping(rtol=2e-2))
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose(layer, inputs(dtype=torch.float32))
    assert found.dtype == torch.bfloat16
    assert found.gradients[0].worst_cosine > 0.99


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_callers_gradient_mode_makes_no_difference(mode: Any) -> None:
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell())
    expected = diagnose(layer, inputs(), rounds=0).summary()
    with mode():
        assert diagnose(layer, inputs(), rounds=0).summary() == expected
        assert not torch.is_grad_enabled()


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
    layer = ImplicitLayer(Restless()).train()
    layer.cell.linear.bias.requires_grad_(False)
    layer.cell.linear.weight.grad = torch.ones_like(layer.cell.linear.weight)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    calls, x = layer.cell.calls, inputs().requires_grad_()
    upstream = 2 * x
    random = torch.get_rng_state()
    found = diagnose(layer, upstream)
    assert torch.equal(torch.get_rng_state(), random)
    assert layer.training
    assert layer.cell.training
    assert layer.cell.calls is calls
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])
    assert bool((layer.cell.linear.weight.grad == 1).all())
    assert not layer.cell.linear.bias.requires_grad
    assert x.grad is None
    upstream.sum().backward()  # the caller's graph is still there
    assert not found.deterministic
    assert says(found, "gives different values at one point")


def test_what_is_drawn_comes_from_the_generator() -> None:
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell(), stopping=TIGHT)

    def jfb(generator: torch.Generator | None) -> float:
        found = diagnose(layer, inputs(), modes=(JFB(),), solvers=(), num_starts=0, generator=generator)
        return found.gradients[1].worst_cosine

    assert jfb(None) == jfb(None)
    assert jfb(torch.Generator().manual_seed(5)) == jfb(torch.Generator().manual_seed(5))
    assert jfb(torch.Generator().manual_seed(5)) != jfb(torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"solvers": Picard()}, TypeError, "solvers must be a list or tuple, got Picard"),
        ({"solvers": ["picard"]}, TypeError, r"solvers\[0\] must be a deqlib solver"),
        ({"modes": [Picard()]}, TypeError, r"modes\[0\] must be a deqlib backward"),
        ({"num_starts": -1}, ValueError, "num_starts must be at least 0, got -1"),
        ({"num_products": 0}, ValueError, "num_products must be at least 1, got 0"),
        ({"stopping": 3}, TypeError, "stopping must be a deqlib.Stopping or None"),
        ({"stopping": Stopping.steps(3)}, ValueError, "stopping must have a tolerance"),
        ({"loss": 3}, TypeError, "loss must be callable or None, got int"),
        ({"loss": lambda z: z}, TypeError, r"loss must return a tensor of one number, got \(4, 6\)"),
        ({"loss": lambda z: 1.0}, TypeError, "loss must return a tensor of one number, got float"),
        ({"loss": lambda z: z.detach().sum()}, ValueError, "loss must depend on the fixed point"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator or None, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"diagnose: {words}"):
        diagnose(ImplicitLayer(Cell()), inputs(), **arguments)


def test_a_layer_is_asked_for_and_at_least_one_number() -> None:
    with pytest.raises(TypeError, match=r"diagnose: layer must be a deqlib\.ImplicitLayer"):
        diagnose(Cell(), inputs())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one number, got 0 samples of 6"):
        diagnose(ImplicitLayer(Cell()), inputs(0))


def test_labels_tell_settings_of_one_class_apart() -> None:
    assert labels([Picard(), Anderson(), Auto()]) == ["Picard", "Anderson", "Auto"]
    assert labels([Picard(), Picard(damping=0.5)]) == ["Picard", "Picard(damping=0.5)"]
    modes: list[Backward] = [JFB(), PhantomGradient(steps=2), PhantomGradient(steps=3), StochasticJFB()]
    assert labels(modes)[1:3] == ["PhantomGradient(steps=2)", "PhantomGradient(steps=3)"]


# Suggestions ---------------------------------------------------------------------------------------------


def with_report(found: Diagnosis, kind: type[MetricReport], **changes: Any) -> Diagnosis:
    """The diagnosis with other numbers in one of its reports."""
    assert any(isinstance(report, kind) for report in found.reports)
    reports = [replace(r, **changes) if isinstance(r, kind) else r for r in found.reports]
    return replace(found, reports=tuple(reports))


def with_gradient(found: Diagnosis, index: int, **changes: Any) -> Diagnosis:
    modes = list(found.gradients)
    modes[index] = replace(modes[index], **changes)
    return with_report(found, GradientComparison, modes=tuple(modes))


def test_the_spectral_radius_decides_on_picard(healthy: Diagnosis) -> None:
    words = r"spectral radius is 1 or more for (\d) of 4 samples"
    assert not says(healthy, words)
    radius = torch.tensor([0.9, 1.0, 1.2, 0.5], dtype=torch.float64)
    (line,) = [
        s for s in with_report(healthy, SpectrumReport, radius=radius).suggestions if "Picard cannot" in s
    ]
    assert "for 2 of 4 samples (largest 1.20)" in line
    slow = with_report(healthy, SpectrumReport, radius=radius.clamp(max=0.98))
    assert not says(slow, "close to 1")  # an accelerated solver does not mind
    by_picard = replace(slow, layer=replace(slow.layer, solver=Picard()))
    assert says(by_picard, "close to 1 for 2 of 4 samples: Picard needs about 114 steps a digit")


def test_the_cheapest_good_gradient_is_named(healthy: Diagnosis) -> None:
    index = [report.name for report in healthy.gradients].index("JFB")
    own = healthy.gradients[0]
    good = with_gradient(healthy, index, cosine=0.96, input_cosine=0.95)
    assert says(good, rf"JFB is good enough .*saves {own.evaluations + own.products - 2} evaluations")
    for cosine in (0.94, math.nan):
        assert not says(with_gradient(healthy, index, cosine=cosine, input_cosine=0.99), "JFB is good")
    assert not says(with_gradient(good, 0, evaluations=1, products=1), "is good enough")


def test_a_poor_gradient_of_the_layers_own_is_pointed_out() -> None:
    found = diagnose(ImplicitLayer(Cell(gain=0.2), backward=JFB()), inputs(), num_starts=0)
    assert not says(found, "layer's JFB")
    assert says(with_gradient(found, 0, cosine=0.5), r"layer's JFB has a cosine of 0\.50")


def test_gradients_are_not_judged_by_an_exact_one_that_is_not_known(healthy: Diagnosis) -> None:
    lost = replace(healthy.exact_adjoint, relative_residual=torch.full((4,), 0.1))
    good = with_gradient(healthy, 1, cosine=1.0, input_cosine=1.0)
    assert says(good, "is good enough")
    unknown = with_report(good, GradientComparison, exact_adjoint=lost)
    assert not says(unknown, "is good enough")
    by_jfb = with_report(unknown, GradientComparison, modes=good.gradients[1:])
    assert says(by_jfb, "exact gradient is not known")


def test_an_adjoint_that_fails_is_reported() -> None:
    rule = Stopping(rtol=1e-6, max_steps=2)
    layer = ImplicitLayer(Cell(), backward=ImplicitDifferentiation(stopping=rule))
    found = diagnose(layer, inputs())
    assert says(found, r"adjoint misses its tolerance for 4 of 4 samples \(4 max_steps")
    assert found.exact_adjoint.num_failed == 0
    assert found.gradients[0].products == 4  # two steps, what measures them, the gradient


def test_path_dependence_has_a_threshold(healthy: Diagnosis) -> None:
    assert healthy.path is not None
    far = torch.tensor([0.0, 0.009, 0.011, math.nan])
    assert says(with_report(healthy, PathReport, distance=far), "for 1 of 4 samples")
    lost = with_report(healthy, PathReport, reached=torch.tensor([4, 4, 3, 4]))
    assert says(lost, "does not converge for 1 of 4 samples")
    assert not says(healthy, "does not converge for")


def test_a_faster_solver_is_named_only_if_it_pays(healthy: Diagnosis) -> None:
    own, *others = healthy.solvers

    def with_nfe(share: float) -> Diagnosis:
        quick = replace(others[0], name="Quick", nfe=int(share * own.nfe))
        return replace(healthy, solvers=(own, quick))

    assert not says(with_nfe(0.9), "Quick")
    assert says(with_nfe(0.5), r"Quick reaches the tolerance in \d+ evaluations, the layer's Anderson takes")


def test_a_solver_that_succeeds_where_the_layers_fails_is_named() -> None:
    base = linear([-1.5, 0.3, 0.2], dtype=torch.float64)
    found = diagnose(ImplicitLayer(base.cell, solver=Picard()), *base.inputs)
    assert says(
        found, r"(Anderson|Broyden) reaches the tolerance for all samples, in \d+ evaluations: use it"
    )


def test_a_tolerance_that_the_type_cannot_hold_is_called_so() -> None:
    stopping = Stopping(rtol=1e-5)
    layer = ImplicitLayer(Cell(width=32, dtype=torch.bfloat16), stopping=stopping)
    found = diagnose(layer, inputs(4, 32, torch.bfloat16))
    assert says(found, r"rtol=1e-05 is beyond .*bfloat16 resolves 8e-03.*use rtol=2e-02")
    short = diagnose(ImplicitLayer(Cell(), stopping=Stopping(rtol=1e-9, max_steps=3)), inputs())
    assert not says(short, "is beyond what")
    assert says(short, "raise Stopping.max_steps")


def test_a_layer_without_fault_is_told_so() -> None:
    layer = ImplicitLayer(Cell(gain=0.1), backward=JFB())
    assert diagnose(layer, inputs(), rounds=0).suggestions == (
        "Nothing to change: the layer converges, and no cheaper setting does as well.",
    )


# Report --------------------------------------------------------------------------------------------------


def test_the_summary_holds_every_number_in_aligned_columns(healthy: Diagnosis) -> None:
    text = healthy.summary()
    assert text == str(healthy)
    assert text.startswith("4 samples of 6 numbers, float64, relative residual 1e-03 within 50 steps\n")
    for words in ("Anderson (layer)", "Picard", "Broyden", "spectral radius of J", "path dependence", "JFB"):
        assert words in text
    assert all(f"- {line}" in text.replace("\n  ", " ") for line in healthy.suggestions)
    table = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1


@dataclass(frozen=True, eq=False)
class SizeReport(MetricReport):
    size: Tensor

    def numbers(self) -> dict[str, Tensor]:
        return {"size of the fixed point": self.size}


def test_a_new_metric_is_a_function_and_a_line_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_size(experiment: Experiment) -> MetricReport:
        return SizeReport(experiment.z.norm(dim=1), notes=("sizes are Euclidean",))

    monkeypatch.setattr("deqlib.diagnostics.diagnosis.METRICS", (*metrics.METRICS, measure_size))
    found = diagnose(ImplicitLayer(lambda z, x: 0.5 * z + x), torch.ones(2, 4).double(), num_starts=0)
    (size,) = [report for report in found.reports if isinstance(report, SizeReport)]
    assert size.size.tolist() == pytest.approx([4.0, 4.0])
    assert re.search("size of the fixed point +4.000 +4.000 +4.000\n", found.summary())
    assert found.notes == ("sizes are Euclidean",)


def test_the_plot_has_four_panels_with_the_measured_lines(healthy: Diagnosis, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = healthy.plot(tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    residuals, sizes, cosines, paths = figure.axes
    assert residuals.get_yscale() == paths.get_yscale() == "log"
    labelled = {line.get_label(): line for line in residuals.get_lines()}
    for report in healthy.solvers:
        name = report.name + " (layer)" * (report is healthy.layer)
        assert list(labelled[name].get_ydata()) == pytest.approx(report.worst.tolist())
    lines = {line.get_label(): line.get_ydata() for line in sizes.get_lines()}
    order = healthy.spectral_radius.argsort()
    assert list(lines["spectral radius"]) == healthy.spectral_radius[order].tolist()
    assert list(lines["spectral norm"]) == healthy.spectral_norm[order].tolist()
    assert list(lines["contraction of Picard"]) == healthy.contraction[order].tolist()
    names = [label.get_text() for label in cosines.get_yticklabels()]
    own, *others = [report.name for report in healthy.gradients]
    assert names == [f"{own} (layer)", *others]
    bars = [bar.get_width() for bar in cosines.patches]
    assert bars == [r.cosine for r in healthy.gradients] + [r.input_cosine for r in healthy.gradients]
    assert healthy.path is not None
    (shown,) = paths.get_lines()
    assert len(shown.get_ydata()) == 4


def test_without_matplotlib_the_plot_says_what_to_install(
    healthy: Diagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'deqlib\[plot\]'"):
        healthy.plot()


def test_unrolling_is_compared_too() -> None:
    found = diagnose(ImplicitLayer(Cell(), backward=Unroll()), inputs(), num_starts=0)
    own = found.gradients[0]
    assert own.evaluations == found.layer.nfe
    assert own.worst_cosine > 0.99

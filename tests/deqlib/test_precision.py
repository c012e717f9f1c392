"""Which of its two solves puts a layer's gradient off, by how much, and on which samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deqlib import JFB, Backward, ImplicitDifferentiation, ImplicitLayer, Picard, Stopping
from deqlib.diagnostics import Diagnosis, diagnose
from deqlib.diagnostics.gradients import Difference
from deqlib.diagnostics.metrics.gradients import GradientComparison

LOOSE = Stopping(rtol=1e-2, max_steps=2000, patience=None)
TIGHT = Stopping(rtol=1e-12, max_steps=4000, patience=None)
FAST: dict[str, Any] = {"num_starts": 0, "solvers": (), "modes": (), "rounds": 0}


class Edge(nn.Module):
    """sin(W z) + x: its Jacobian W cos(W z) has a spectral radius just below that of W."""

    def __init__(self, radius: float = 0.99, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(radius * torch.eye(width, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.sin(z @ self.weight.T) + x


def small(batch: int = 4, width: int = 4, scale: float = 1e-3) -> Tensor:
    drawn = torch.rand(batch, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scale * (1 + drawn)


def edge(stopping: Stopping = LOOSE, backward: Backward | None = None, radius: float = 0.99) -> ImplicitLayer:
    backward = ImplicitDifferentiation(stopping=TIGHT) if backward is None else backward
    return ImplicitLayer(Edge(radius), solver=Picard(), stopping=stopping, backward=backward)


def finding(found: Diagnosis) -> str:
    """What is said of the layer's own gradient; empty where nothing is."""
    words = ("gradient is off by", "forward solve alone puts")
    lines = [line for line in found.suggestions if any(word in line for word in words)]
    assert len(lines) <= 1
    return lines[0] if lines else ""


def gradient(cell: Edge, x: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """By dense linear algebra, at any z: of the weight for each sample (B, D, D), of x (B, D)."""
    slope = torch.cos(z @ cell.weight.detach().T)
    jacobian = slope.unsqueeze(2) * cell.weight.detach()
    u = torch.linalg.solve(torch.eye(z.shape[1], dtype=z.dtype) - jacobian.mT, g.unsqueeze(2)).squeeze(2)
    return (slope * u).unsqueeze(2) * z.unsqueeze(1), u


class Steep(Edge):
    """sinh(W z) + x, ever steeper on the way to the fixed point."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.sinh(z @ self.weight.T) + x


def test_at_the_edge_a_loose_forward_solve_is_named_and_mended_by_what_is_advised() -> None:
    cell = Steep(0.98)
    # The slope 0.98 cosh(0.98 z) is 0.99 there.
    fixed = torch.full((4, 4), math.acosh(0.99 / 0.98) / 0.98, dtype=torch.float64)
    x = (fixed - torch.sinh(0.98 * fixed)).detach()
    layer = edge()
    layer.cell = cell
    found = diagnose(layer, x, **FAST)
    assert found.spectral_radius.tolist() == pytest.approx([0.99] * 4, rel=1e-4)
    assert found.precision.error > 0.5
    assert found.precision.forward.worst > 0.5
    assert found.precision.adjoint is not None
    assert found.precision.adjoint.worst < 1e-6
    words = finding(found)
    assert "tighten the forward solve, stopping=Stopping(rtol=" in words
    assert "tighten the adjoint" not in words
    rtol = float(words.partition("Stopping(rtol=")[2].partition(")")[0])
    layer.stopping = replace(LOOSE, rtol=rtol)
    mended = diagnose(layer, x, **FAST)
    assert mended.precision.error < 0.1
    assert not finding(mended)


def test_at_the_edge_a_loose_adjoint_is_named() -> None:
    loose = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=0.5))
    found = diagnose(edge(TIGHT, loose), small(), **FAST)
    assert found.precision.forward.worst < 1e-6
    assert found.precision.adjoint is not None
    assert found.precision.adjoint.worst > 0.1
    assert "tighten the adjoint, ImplicitDifferentiation(stopping=Stopping(rtol=" in finding(found)
    assert "tighten the forward" not in finding(found)


def test_both_are_named_where_both_are_loose_and_the_steps_where_their_number_is_fixed() -> None:
    fixed = ImplicitDifferentiation(solver=Picard(), stopping=Stopping.steps(2))
    found = diagnose(edge(Stopping.steps(3), fixed), small(), **FAST)
    assert "take more than 3 forward steps and take more than 2 steps of the adjoint" in finding(found)
    few = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-6, max_steps=2))
    failing = diagnose(edge(replace(LOOSE, max_steps=3), few), small(), **FAST)
    assert "give the forward solve more steps or another solver" in finding(failing)
    assert "give the adjoint more steps or another solver" in finding(failing)


@pytest.mark.parametrize("radius", [0.1, 0.5, 0.8])
def test_a_layer_that_behaves_is_told_nothing(radius: float) -> None:
    layer = ImplicitLayer(Edge(radius))
    found = diagnose(layer, small(scale=0.5), **FAST)
    assert found.precision.error < 0.1
    assert not finding(found)


def test_with_another_mode_the_forward_solve_alone_is_judged() -> None:
    found = diagnose(edge(backward=JFB()), small(), **FAST)
    assert found.precision.both is found.precision.adjoint is None
    assert finding(found).startswith("The layer's forward solve alone puts the exact gradient off by")
    assert "stopping=Stopping(rtol=" in finding(found)


def test_nothing_is_said_where_the_exact_gradient_is_not_known() -> None:
    found = diagnose(edge(), small(), **FAST)
    lost = replace(found.exact_adjoint, relative_residual=torch.full((4,), 0.1))
    reports = tuple(
        replace(report, exact_adjoint=lost) if isinstance(report, GradientComparison) else report
        for report in found.reports
    )
    assert finding(found)
    assert not finding(replace(found, reports=reports))


def test_a_tolerance_that_the_type_cannot_hold_is_not_advised() -> None:
    found = diagnose(edge(), small(), **FAST)
    assert "or use a finer type" in finding(replace(found, dtype=torch.bfloat16))


@given(
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    radius=st.sampled_from([0.5, 0.9, 0.97]),
    rtol=st.sampled_from([1e-1, 1e-2, 1e-4]),
)
def test_errors_and_shares_are_those_of_dense_gradients_sample_by_sample(
    batch: int, seed: int, radius: float, rtol: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    cell = Edge(radius, 3)
    rule = Stopping(rtol=rtol, max_steps=300, patience=None)
    layer = ImplicitLayer(
        cell, solver=Picard(), stopping=rule, backward=ImplicitDifferentiation(stopping=TIGHT)
    )
    found = diagnose(layer, x, loss=lambda z: (g * z).sum(), **FAST).precision
    with torch.no_grad():
        early, late = (layer.solve(x, stopping=one).value for one in (rule, TIGHT))
    (weights, inputs), (exact_weights, exact_inputs) = (gradient(cell, x, g, z) for z in (early, late))
    apart = (weights - exact_weights).sum(0)
    error = float(apart.norm() / exact_weights.sum(0).norm())
    input_error = float((inputs - exact_inputs).norm() / exact_inputs.norm())
    assert found.both is not None
    assert found.both.error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert found.both.input_error == pytest.approx(input_error, rel=1e-3, abs=1e-9)
    if max(error, input_error) < 1e-6 or abs(error - input_error) < 1e-6:
        return
    if error > input_error:
        shares = ((weights - exact_weights) * apart).sum((1, 2)) / apart.square().sum()
    else:
        shares = (inputs - exact_inputs).square().sum(1) / (inputs - exact_inputs).square().sum()
    torch.testing.assert_close(found.share, shares, rtol=1e-3, atol=1e-4)
    assert float(found.share.sum()) == pytest.approx(1)


def test_the_samples_that_dominate_are_named_and_the_one_that_is_furthest_off() -> None:
    x = torch.cat([small(5, scale=0.5), small(1, scale=1e-3)])
    layer = edge()
    found = diagnose(layer, x, **FAST)
    assert int(found.precision.share.argmax()) == 5
    assert "Sample 5 makes up" in finding(found)
    assert f"is that of sample {int(found.precision.residual.argmax())} (" in finding(found)
    alike = diagnose(layer, small(1).expand(8, 4).contiguous(), loss=lambda z: z.sum(), **FAST)
    assert "No few samples dominate" in finding(alike)
    assert "ample" not in finding(diagnose(layer, small(1), **FAST))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.sin(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grads[0] * torch.cos(z)


def test_of_a_cell_that_is_differentiable_once_the_shares_are_those_of_the_adjoints() -> None:
    weight = nn.Parameter(0.99 * torch.eye(4, dtype=torch.float64))
    once = ImplicitLayer(
        lambda z, x: _Once.apply(z @ weight.T) + x,
        solver=Picard(),
        stopping=LOOSE,
        backward=ImplicitDifferentiation(stopping=TIGHT),
    )
    found = diagnose(once, torch.cat([small(3, scale=0.5), small(1)]), **FAST)
    assert int(found.precision.share.argmax()) == 3
    assert float(found.precision.share.sum()) == pytest.approx(1)
    assert finding(found)


def test_the_table_tells_the_errors_apart() -> None:
    found = diagnose(edge(), small(), **FAST)
    (part,) = [part for part in str(found).split("\n\n") if part.startswith("error of the exact gradient")]
    both, forward, adjoint = part.splitlines()[1:]
    assert both.startswith("forward and adjoint as the layer's")
    assert forward.split()[-2:] == both.split()[-2:]
    assert float(adjoint.split()[-1]) < 1e-6


def test_without_known_errors_the_worst_is_not_known() -> None:
    assert math.isnan(Difference(None, None).worst)
    assert math.isnan(Difference(0.5, math.nan).worst)
    assert Difference(0.5, None).worst == 0.5


# Times --------------------------------------------------------------------------------------------------


def test_times_are_told_as_often_as_asked_and_their_parts_add_up() -> None:
    layer = ImplicitLayer(Edge(0.5))
    found = diagnose(layer, small(), num_starts=0, rounds=2)
    assert len(found.evaluation_times) == 2
    assert all(len(report.times) == 2 for report in found.solvers)
    for mode in found.gradients:
        assert len(mode.times) == len(mode.backward_times) == 2
        assert all(0 < back < both for back, both in zip(mode.backward_times, mode.times, strict=True))
        assert mode.record()["backward_seconds"] == mode.backward_seconds > 0
    for words in ("  ms  in evaluations", "forward ms  backward ms", "one evaluation of the cell takes"):
        assert words in str(found)
    silent = diagnose(layer, small(), **FAST)
    assert silent.evaluation_times == silent.solvers[0].times == silent.gradients[0].times == ()
    assert math.isnan(silent.evaluation_seconds)
    assert " ms" not in str(silent)


def timed(found: Diagnosis, own: float, other: float, nfe: int) -> Diagnosis:
    """Two solvers with other times, the second with so many evaluations."""
    first = replace(found.solvers[0], times=(own,))
    second = replace(found.solvers[1], times=(other,), nfe=nfe)
    return replace(found, solvers=(first, second), layer=first)


def test_time_is_told_beside_evaluations() -> None:
    found = diagnose(ImplicitLayer(Edge(0.5)), small(), num_starts=0, rounds=1, solvers=[Picard()], modes=())
    nfe = found.layer.nfe

    def says(changed: Diagnosis) -> str:
        return " ".join(line for line in changed.suggestions if "Picard" in line)

    assert "in time 3.00 of what that takes" in says(timed(found, 1.0, 3.0, nfe // 2))
    assert "Picard takes 0.25 of the time of the layer's Auto" in says(timed(found, 1.0, 0.25, nfe + 5))
    assert "of the time" not in says(timed(found, 1.0, 0.75, nfe + 5))

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from deqlib import Auto, NewtonKrylov, Picard, Solver, Stopping, fixed_point
from deqlib.testing import tanh_rnn


def test_the_defaults_are_those_documented() -> None:
    rule = Stopping()
    assert (rule.rtol, rule.atol, rule.max_steps) == (1e-3, 0.0, 50)
    assert not rule.is_fixed


def test_steps_is_a_fixed_number_of_steps_that_measures_only_when_asked() -> None:
    assert Stopping.steps(7).is_fixed
    assert Stopping.steps(7).max_steps == 7
    assert not Stopping.steps(7).measure
    assert Stopping.steps(7, measure=True).measure
    assert Stopping.steps(0).max_steps == 0


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rtol": -1e-3}, ValueError, r"rtol must be in \[0, 1e\+38\], got -0.001"),
        ({"rtol": float("nan")}, ValueError, "rtol"),
        ({"rtol": "1e-3"}, TypeError, r"rtol must be a number, got '1e-3' \(str\)"),
        ({"atol": -1.0}, ValueError, "atol"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_steps": 10.0}, TypeError, "max_steps must be an int, got 10.0"),
        ({"check_every": 0}, ValueError, "check_every"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"blowup": 1.0}, ValueError, r"blowup must be in \(1, inf\], got 1.0"),
        ({"norm_axes": -1}, TypeError, "norm_axes must be a tuple of axes or None, got -1"),
        ({"norm_axes": ()}, TypeError, "norm_axes must be a tuple of axes"),
        ({"rtol": None, "measure": False, "norm_axes": (-1,)}, ValueError, "norm_axes.*has no effect"),
        ({"measure": False}, ValueError, r"measure=False needs a fixed number of steps.*Stopping.steps"),
        ({"rtol": None, "max_steps": -1}, ValueError, "max_steps must be at least 0, got -1"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Stopping(**settings)


@pytest.mark.parametrize("setting", [{"atol": 1e-3}, {"check_every": 5}, {"patience": 3}, {"blowup": 10.0}])
def test_a_setting_that_a_fixed_number_of_steps_makes_inert_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"{next(iter(setting))}.* has no effect with a fixed number of steps"
    ):
        Stopping(rtol=None, max_steps=5, **setting)


def test_a_rule_is_a_value() -> None:
    assert Stopping(rtol=1e-4) == Stopping(rtol=1e-4)
    assert hash(Stopping(rtol=1e-4)) == hash(Stopping(rtol=1e-4))
    assert dataclasses.replace(Stopping(), max_steps=9) == Stopping(max_steps=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stopping().rtol = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Stopping(1e-3)  # type: ignore[misc]


def test_a_schedule_goes_from_one_rule_to_the_other() -> None:
    start, end = Stopping(rtol=1e-1, max_steps=10, patience=7), Stopping(rtol=1e-3, max_steps=50, atol=1e-2)
    assert start.towards(end, 0.0) == start
    half = start.towards(end, 0.5)
    assert half.rtol == pytest.approx(1e-2)  # geometrically
    assert half.atol == pytest.approx(5e-3)  # linearly, as one of them is 0
    assert (half.max_steps, half.patience) == (30, 7)
    last = start.towards(end, 1.0)
    assert (last.rtol, last.atol, last.max_steps) == (pytest.approx(1e-3), pytest.approx(1e-2), 50)
    assert Stopping.steps(4).towards(Stopping.steps(9), 0.6) == Stopping.steps(7)


def test_a_schedule_needs_rules_of_one_kind_and_a_fraction() -> None:
    with pytest.raises(ValueError, match="both rules must have a tolerance"):
        Stopping().towards(Stopping.steps(3), 0.5)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        Stopping().towards(Stopping(), 1.5)


RATES = torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64).view(1, 3, 1)  # of three tokens
X = torch.tensor([100.0, 1e-3, 1.0], dtype=torch.float64).view(1, 3, 1).expand(2, 3, 4)  # and their sizes


def tokens(z: Tensor) -> Tensor:
    return RATES * z + X


def test_with_norm_axes_every_place_converges_by_itself() -> None:
    results = {}
    for axes in (None, (-1,), (2,), (1, 2)):
        rule = Stopping(rtol=1e-3, max_steps=200, norm_axes=axes)
        with torch.no_grad():
            results[axes] = fixed_point(tokens, torch.zeros(2, 3, 4).double(), solver=Picard(), stopping=rule)
    worst = {}
    for axes, solution in results.items():
        fz = tokens(solution.value)
        relative = (fz - solution.value).norm(dim=2) / fz.norm(dim=2)
        worst[axes] = relative.amax(1)
        assert solution.converged.all()
    assert (worst[None] > 1e-2).all()  # the small slow token hides behind the large fast one
    assert (worst[(-1,)] <= 1e-3).all()
    torch.testing.assert_close(results[(-1,)].relative_residual, worst[(-1,)])
    assert torch.equal(results[(-1,)].value, results[(2,)].value)
    assert torch.equal(results[None].num_steps, results[(1, 2)].num_steps)


def test_norm_axes_apply_to_every_leaf_and_must_exist() -> None:
    z0 = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 5)}
    cell = lambda z: {"a": 0.5 * z["a"] + 1, "b": 0.9 * z["b"] + 1}  # noqa: E731
    with torch.no_grad():
        solution = fixed_point(cell, z0, stopping=Stopping(norm_axes=(-1,)))
    assert solution.converged.all()
    for axes in ((2,), (0,), (-3,)):
        with pytest.raises(ValueError, match="norm_axes must be axes of every leaf of the state"):
            fixed_point(cell, z0, stopping=Stopping(norm_axes=axes))
    with pytest.raises(ValueError, match="each once"):
        fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), stopping=Stopping(norm_axes=(1, -1)))
    with pytest.raises(ValueError, match="must name an axis once"):
        Stopping(norm_axes=(1, 1))


def test_norm_axes_and_measured_steps() -> None:
    rule = Stopping(rtol=None, max_steps=3, norm_axes=(-1,))
    with torch.no_grad():
        solution = fixed_point(tokens, torch.zeros(2, 3, 4).double(), solver=Picard(), stopping=rule)
    fz = tokens(solution.value)
    relative = (fz - solution.value).norm(dim=2) / fz.norm(dim=2)
    torch.testing.assert_close(solution.relative_residual, relative.amax(1))


def test_a_residual_that_came_to_nothing_in_every_place_is_0_and_not_nothing() -> None:
    with torch.no_grad():
        for offset in (0.0, 1.0):
            solution = fixed_point(
                lambda z, offset=offset: torch.full_like(z, offset),
                torch.zeros(1, 2, 3),
                solver=Picard(),
                stopping=Stopping(norm_axes=(-1,)),
            )
            assert solution.relative_residual.tolist() == [0]
            assert solution.trace[-1].tolist() == [0]


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_a_newton_step_is_of_the_whole_sample_whatever_its_residual_is_measured_by(derivative: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = 0.2 * torch.randn(20, 20, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        solution = fixed_point(
            lambda z: torch.tanh((z.flatten(1) @ weight).view_as(z) + x),
            torch.zeros_like(x),
            solver=NewtonKrylov(derivative=derivative),
            stopping=Stopping(rtol=1e-8, max_steps=120, norm_axes=(-1,)),
            on_failure="ignore",
        )
    assert solution.converged.all()


@pytest.mark.parametrize("hold_places", [False, True])
def test_padding_of_zeros_does_not_keep_a_solver_from_seeing_how_far_the_rest_is(hold_places: bool) -> None:
    rates = torch.linspace(0.1, 0.97, 6, dtype=torch.float64)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = Stopping(rtol=1e-8, max_steps=60, norm_axes=(-1,), hold_places=hold_places)
    found = []
    for is_padded in (False, True):
        mask = torch.tensor([[1.0], [1.0], [1.0 - is_padded]], dtype=torch.float64)
        with torch.no_grad():
            found.append(
                fixed_point(lambda z, mask=mask: mask * (rates * z + x), torch.zeros_like(x), stopping=rule)
            )
    # The plain iteration would take 600 steps.
    assert found[1].converged.all()
    assert found[1].nfe <= found[0].nfe


@pytest.mark.parametrize("rtol", [1e-3, 1e-10])
@pytest.mark.parametrize("solver", [Picard(), Auto(), NewtonKrylov()], ids=lambda s: type(s).__name__)
def test_a_sample_that_has_to_go_on_at_its_solution_neither_stalls_nor_diverges(
    solver: Solver, rtol: float
) -> None:
    problem = tanh_rnn(width=8, rate=0.5, dtype=torch.float64)
    rule = Stopping(rtol=rtol, min_steps=90, max_steps=120)
    with torch.no_grad():
        found = fixed_point(problem.cell, problem.z0, problem.inputs, solver=solver, stopping=rule)
    assert found.converged.all()
    assert (found.num_steps >= 90).all()

"""Random depth: what is drawn, for a batch and for each sample, and the solves that it leads to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import deqlib
from deqlib import (
    Anderson,
    Auto,
    Broyden,
    DepthDistribution,
    Geometric,
    ImplicitLayer,
    LogNormalPoisson,
    NewtonKrylov,
    Picard,
    Poisson,
    ReversiblePicard,
    Solver,
    StochasticJFB,
    Stopping,
    Uniform,
    Unroll,
    fixed_point,
)
from deqlib.depths import draw

# Mean and variance, worked out by hand from the text of each docstring.
MOMENTS = {
    "uniform": (Uniform(2, 8), 5.0, (7**2 - 1) / 12),
    "poisson": (Poisson(6), 6.0, 6.0),
    "poisson from 1": (Poisson(6, least=1), 6.0, 5.0),
    "log-normal poisson": (LogNormalPoisson(8, 0.5), 8.0, 8 + 64 * (math.exp(0.25) - 1)),
    "log-normal poisson from 2": (
        LogNormalPoisson(8, sigma=0.3, least=2),
        8.0,
        6 + 36 * (math.exp(0.09) - 1),
    ),
    "geometric": (Geometric(4), 4.0, 12.0),
    "geometric from 0": (Geometric(4, least=0), 4.0, 20.0),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix() -> Tensor:
    return 0.4 * torch.randn(4, 4, generator=seeded(3), dtype=torch.float64) / 2


def inputs(batch: int = 6) -> Tensor:
    return torch.randn(batch, 4, generator=seeded(4), dtype=torch.float64)


def near(drawn: Tensor, mean: float, variance: float) -> None:
    """Mean and variance within 3 standard errors, the variance's from the drawn fourth moment."""
    x, n = drawn.double(), drawn.numel()
    assert abs(float(x.mean()) - mean) <= 3 * math.sqrt(variance / n)
    error = math.sqrt((float((x - mean).pow(4).mean()) - variance**2) / n)
    assert abs(float((x - mean).square().mean()) - variance) <= 3 * error


@pytest.mark.parametrize("name", MOMENTS)
def test_numbers_of_steps_have_the_mean_and_variance_that_are_documented(name: str) -> None:
    depth, mean, variance = MOMENTS[name]
    drawn = depth.draw((20_000,), seeded(1))
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) == depth.least
    near(drawn, mean, variance)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_a_layer_takes_as_many_steps_as_its_distributions_say(per: Any) -> None:
    x = torch.ones(200 if per == "sample" else 1, 1, requires_grad=True)
    mode = StochasticJFB(no_grad=Poisson(3), grad=Geometric(2), per=per, generator=seeded(3))
    layer = ImplicitLayer(lambda z, x: 0.5 * z + x, solver=Picard(), backward=mode)
    taken = torch.cat([layer.solve(x).num_steps for _ in range(5 if per == "sample" else 300)])
    near(taken, 5.0, 3.0 + 2.0)


@given(seed=st.integers(0, 1000), n=st.integers(1, 5), least=st.integers(0, 3))
def test_a_depth_is_alike_for_generators_alike_and_never_below_its_least(
    seed: int, n: int, least: int
) -> None:
    mean = least + 2.5
    for depth in (
        Poisson(mean, least=least, most=least + 3),
        LogNormalPoisson(mean, least=least, most=least + 3),
        Geometric(mean, least=least, most=least + 3),
        Uniform(least, least + 3),
        (least, least + 3),
        least,
    ):
        one, other = (draw(depth, (n,), seeded(seed)) for _ in range(2))
        assert torch.equal(one, other)
        assert int(one.min()) >= least
        assert int(one.max()) <= least + 3


def test_a_distribution_without_spread_gives_its_mean() -> None:
    for depth in (Poisson(2, least=2), Geometric(1), LogNormalPoisson(3, least=3), Uniform(2, 2)):
        assert set(depth.draw((50,), seeded()).tolist()) == {depth.least}


def test_a_fixed_number_of_steps_draws_nothing() -> None:
    generator = seeded()
    before = generator.get_state()
    mode = StochasticJFB(no_grad=3, grad=2, generator=generator)
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 1), backward=mode)
    assert solution.num_steps.tolist() == [5, 5]
    assert torch.equal(generator.get_state(), before)


# Total --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_of_a_total_the_last_steps_have_gradient_and_all_if_they_are_fewer(per: Any) -> None:
    a, x = matrix().requires_grad_(), inputs()
    taped: list[bool] = []

    def cell(z: Tensor) -> Tensor:
        taped.append(torch.is_grad_enabled())
        return torch.tanh(z @ a + x)

    for total, grad, expected in ((5, 1, [4, 1]), (5, 3, [2, 3]), (2, 4, [0, 2])):
        taped.clear()
        mode = StochasticJFB(total=total, grad=grad, per=per)
        solution = fixed_point(cell, torch.zeros_like(x), solver=Picard(), backward=mode)
        assert taped == [False] * expected[0] + [True] * expected[1]
        assert solution.num_steps.tolist() == [total] * 6
        assert solution.nfe == total
        assert solution.sample_nfe.tolist() == [total] * 6


def test_a_drawn_total_is_the_number_of_steps_taken() -> None:
    x = torch.ones(300, 1, requires_grad=True)
    mode = StochasticJFB(total=Poisson(6, least=1), grad=(1, 3), per="sample", generator=seeded(5))
    solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros(300, 1), solver=Picard(), backward=mode)
    near(solution.num_steps, 6.0, 5.0)
    assert int(solution.num_steps.min()) >= 1


# A draw a sample ----------------------------------------------------------------------------------------

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "damped": Picard(damping=0.6),
    "anderson": Anderson(memory=2),
    "broyden": Broyden(memory=3),
    "newton": NewtonKrylov(),
    "reversible": ReversiblePicard(),
    "auto": Auto(),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_each_sample_has_the_value_and_gradient_of_its_own_depth_alone(name: str, checkpoint: bool) -> None:
    """The reference solves every sample by itself, a fixed number of steps off the tape, then on it."""
    solver, x, a = SOLVERS[name], inputs().requires_grad_(), matrix().requires_grad_()
    mode = StochasticJFB(
        no_grad=Poisson(2), grad=Uniform(1, 4), per="sample", generator=seeded(6), checkpoint=checkpoint
    )
    z0 = torch.zeros_like(x)
    solution = fixed_point(lambda z, x: torch.tanh(z @ a + x), z0, (x,), solver=solver, backward=mode)
    seed = int(torch.randint(2**62, (), generator=seeded(6)))
    twin = seeded(seed)
    free, taped = (depth.draw((6,), twin).tolist() for depth in (Poisson(2), Uniform(1, 4)))
    assert len(set(zip(free, taped, strict=True))) > 3
    assert solution.num_steps.tolist() == [n + k for n, k in zip(free, taped, strict=True)]
    assert solution.nfe == max(free) + max(taped)

    values = []
    for i, (n, k) in enumerate(zip(free, taped, strict=True)):
        f = lambda z, i=i: torch.tanh(z @ a + x[i : i + 1])  # noqa: E731
        with torch.no_grad():
            start = fixed_point(f, z0[i : i + 1], solver=solver, stopping=Stopping.steps(n)).value
        settings: dict[str, Any] = {"solver": solver, "stopping": Stopping.steps(k), "backward": Unroll()}
        values.append(fixed_point(f, start, **settings).value)
    alone = torch.cat(values)
    torch.testing.assert_close(solution.value, alone, rtol=1e-9, atol=1e-11)
    g = torch.randn(alone.shape, generator=seeded(7), dtype=torch.float64)
    found = torch.autograd.grad(solution.value, (x, a), g)
    for ours, theirs in zip(found, torch.autograd.grad(alone, (x, a), g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_sample_that_is_not_finite_spoils_no_other() -> None:
    x = inputs().float().index_fill(0, torch.tensor([2]), torch.inf).requires_grad_()
    mode = StochasticJFB(no_grad=2, grad=Uniform(1, 4), per="sample", generator=seeded(8))
    value = fixed_point(
        lambda z, x: 0.5 * z + x, torch.zeros(6, 4), (x,), solver=Picard(), backward=mode
    ).value
    others = [0, 1, 3, 4, 5]
    assert value[others].isfinite().all()
    (gradient,) = torch.autograd.grad(value[others].sum(), x)
    assert gradient[others].isfinite().all()


def test_the_generator_moves_on_alike_whatever_the_number_of_samples() -> None:
    """Else processes with batches of different sizes would never draw alike again."""

    def after(batch: int, depth: Any) -> Tensor:
        mode = StochasticJFB(no_grad=depth, grad=depth, per="sample", generator=seeded(9))
        fixed_point(lambda z: 0.5 * z + 1, torch.zeros(batch, 1), solver=Picard(), backward=mode)
        assert mode.generator is not None
        return mode.generator.get_state()

    for depth in (Poisson(4, least=1), Geometric(3), (1, 4), LogNormalPoisson(4, least=1), 2):
        assert torch.equal(after(1, depth), after(7, depth))


def test_under_vmap_every_batch_has_the_depths_that_are_drawn() -> None:
    a, many = matrix(), torch.stack([inputs(3), inputs(3).flip(0)])
    mode = StochasticJFB(no_grad=Uniform(0, 3), grad=Uniform(1, 4), per="sample", generator=seeded(10))

    def value(x: Tensor) -> Tensor:
        found: Tensor = fixed_point(
            lambda z, x: torch.tanh(z @ a + x),
            torch.zeros_like(x),
            (x,),
            solver=Picard(),
            backward=replace(mode, generator=seeded(10)),
        ).value
        return found

    torch.testing.assert_close(
        torch.vmap(value, randomness="same")(many), torch.stack([value(x) for x in many])
    )


def test_an_empty_batch_draws_for_nobody() -> None:
    mode = StochasticJFB(no_grad=Poisson(3), grad=2, per="sample")
    solution = fixed_point(lambda z: 0.5 * z, torch.zeros(0, 3), solver=Picard(), backward=mode)
    assert solution.nfe == 0
    assert solution.value.shape == (0, 3)


# A curriculum -------------------------------------------------------------------------------------------


def test_a_curriculum_goes_from_one_depth_to_another() -> None:
    start = StochasticJFB(no_grad=Poisson(2), grad=(1, 2), generator=seeded())
    end = StochasticJFB(no_grad=Poisson(10), grad=(4, 8))
    assert start.towards(end, 0) == replace(start, grad=Uniform(1, 2))
    half = start.towards(end, 0.5)
    assert (half.no_grad, half.grad) == (Poisson(6.0), Uniform(2, 5))
    assert half.generator is start.generator
    assert start.towards(end, 1).no_grad == Poisson(10.0)
    fixed = StochasticJFB(total=1, grad=1).towards(StochasticJFB(total=9, grad=2), 0.3)
    assert (fixed.total, fixed.grad) == (3, 1)
    bounded = LogNormalPoisson(4, 0.2, most=8).towards(LogNormalPoisson(8, 0.6, most=16), 0.5)
    assert (bounded.mean, round(bounded.sigma, 9), bounded.most) == (6.0, 0.4, 12)
    # Of a parameter that is no number of steps an int is a number as any other.
    assert LogNormalPoisson(4, 1).towards(LogNormalPoisson(4, 0), 0.25).sigma == 0.75


def test_a_curriculum_between_depths_of_different_kinds_is_refused() -> None:
    with pytest.raises(TypeError, match=r"end must be a Poisson too, got Geometric\(mean=4\)"):
        Poisson(2).towards(Geometric(4), 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="both must be fixed numbers of steps, or neither, got 3 and"):
        StochasticJFB(grad=3).towards(StochasticJFB(), 0.5)
    with pytest.raises(ValueError, match="most must be given in both or in neither"):
        Poisson(2).towards(Poisson(4, most=8), 0.5)
    with pytest.raises(ValueError, match="both must have total, or both no_grad"):
        StochasticJFB(total=3).towards(StochasticJFB(), 0.5)
    with pytest.raises(ValueError, match=r"StochasticJFB.towards: fraction must be in \[0, 1\], got 2"):
        StochasticJFB().towards(StochasticJFB(), 2)


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Uniform(3, 2), ValueError, "Uniform: most must be at least 3, got 2"),
        (lambda: Uniform(1.5, 2), TypeError, "Uniform: least must be an int"),
        (lambda: Poisson(-1), ValueError, r"Poisson: mean must be in \[0"),
        (lambda: Poisson(float("inf")), ValueError, "Poisson: mean must be finite"),
        (lambda: Poisson(1, least=2), ValueError, r"Poisson: mean must be in \[2"),
        (lambda: Poisson(3, least=2, most=1), ValueError, "Poisson: most must be at least 2, got 1"),
        (lambda: LogNormalPoisson(3, -0.5), ValueError, r"LogNormalPoisson: sigma must be in \[0"),
        (lambda: Geometric(0.5), ValueError, r"Geometric: mean must be in \[1"),
        (lambda: StochasticJFB(grad=Poisson(4)), ValueError, r"grad must be at least 1 .*; give it least=1"),
        (lambda: StochasticJFB(total=Poisson(4)), ValueError, "total must be at least 1 whatever is drawn"),
        (lambda: StochasticJFB(total=0), ValueError, "StochasticJFB: total must be at least 1, got 0"),
        (lambda: StochasticJFB(no_grad=3, total=4), ValueError, "no_grad=3 has no effect beside total=4"),
        (lambda: StochasticJFB(no_grad=True), TypeError, "no_grad must be an int, got True"),
        (lambda: StochasticJFB(no_grad="3"), TypeError, "no_grad must be a tuple .* deqlib.Poisson"),
        (
            lambda: StochasticJFB(per="token"),
            ValueError,
            r"per must be one of \('batch', 'sample'\), got 'token'",
        ),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_settings_read_back_from_their_text() -> None:
    for depth in (Poisson(6, least=1), LogNormalPoisson(8, 0.3), Geometric(4, most=9), Uniform(0, 4)):
        mode = StochasticJFB(no_grad=depth, per="sample")
        assert eval(repr(mode), vars(deqlib).copy()) == mode


def test_a_distribution_of_ones_own_is_a_class_with_one_method() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Twos(DepthDistribution):
        least: int = 2

        def draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
            return torch.full(shape, 2)

    for per in ("batch", "sample"):
        mode = StochasticJFB(no_grad=Twos(), grad=Twos(), per=per)
        solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 1), solver=Picard(), backward=mode)
        assert solution.num_steps.tolist() == [4, 4, 4]


def test_a_trained_layer_draws_for_each_sample_of_a_structured_state() -> None:
    cell = nn.Linear(4, 4)
    layer = ImplicitLayer(
        lambda z, x: {"a": torch.tanh(cell(z["b"]) + x), "b": 0.5 * z["a"]},
        init=lambda x: {"a": torch.zeros_like(x), "b": torch.zeros_like(x)},
        solver=Picard(),
        backward=StochasticJFB(total=Poisson(5, least=1), grad=2, per="sample", generator=seeded(1)),
    )
    value = layer(torch.randn(5, 4))
    value["a"].sum().backward()
    assert cell.weight.grad is not None
    assert cell.weight.grad.isfinite().all()

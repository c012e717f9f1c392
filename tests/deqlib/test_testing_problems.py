from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deqlib import Anderson, Broyden, Picard, Status, Stopping, fixed_point
from deqlib.solution import Solution
from deqlib.state import AUTOMATIC, cut
from deqlib.testing import (
    Problem,
    convolution,
    drift,
    expanding,
    explosion,
    linear,
    mixed_difficulty,
    mixer,
    mlp,
    monotone,
    nearly_singular,
    suite,
    tanh_rnn,
    transformer,
    two_cycle,
)

EVEN = torch.linspace(-0.9, 0.7, 10, dtype=torch.float64)

# Small, and of a batch that no shared input is as long as.
WITH_SOLUTION: dict[str, Callable[..., Problem]] = {
    "linear": lambda **kw: linear(EVEN, batch=3, **kw),
    "non-normal": lambda **kw: linear(EVEN, batch=3, non_normality=1.0, **kw),
    "linear from a list": lambda **kw: linear([0.5, -0.2], batch=3, **kw),
    "nearly singular": lambda **kw: nearly_singular(batch=3, width=10, **kw),
    "expanding": lambda **kw: expanding(batch=3, width=10, **kw),
    "two-cycle": lambda **kw: two_cycle(batch=3, width=4, **kw),
    "tanh RNN": lambda **kw: tanh_rnn(batch=3, width=10, **kw),
    "monotone": lambda **kw: monotone(batch=3, width=10, **kw),
    "MLP": lambda **kw: mlp(batch=3, tokens=2, width=6, **kw),
    "mixer": lambda **kw: mixer(batch=3, tokens=2, width=6, **kw),
    "transformer": lambda **kw: transformer(batch=3, tokens=2, width=8, **kw),
    "convolution": lambda **kw: convolution(batch=3, channels=2, side=4, **kw),
    "mixed difficulty": lambda **kw: mixed_difficulty(batch=3, width=10, **kw),
}
WITHOUT_SOLUTION: dict[str, Callable[..., Problem]] = {
    "drift": lambda **kw: drift(batch=3, width=4, **kw),
    "explosion": lambda **kw: explosion(batch=3, width=4, **kw),
}
ALL = WITH_SOLUTION | WITHOUT_SOLUTION

double = {"dtype": torch.float64}


def jacobian(problem: Problem, z: Tensor) -> Tensor:
    """Of all samples as one vector."""
    return torch.autograd.functional.jacobian(lambda flat: problem.f(flat.view_as(z)).flatten(), z.flatten())


def solve(problem: Problem, solver: Picard | Anderson | Broyden, **rule: float) -> Solution:
    stopping = Stopping(**{"rtol": 1e-10, "max_steps": 100, **rule})
    with torch.no_grad():
        return fixed_point(
            problem.cell, problem.z0, problem.inputs, solver=solver, stopping=stopping, on_failure="ignore"
        )


@pytest.mark.parametrize("name", WITH_SOLUTION)
def test_the_solution_is_a_fixed_point(name: str) -> None:
    for seed in range(3):
        problem = WITH_SOLUTION[name](seed=seed, **double)
        assert (problem.residuals(problem.solution)[1] < 1e-12).all()


@pytest.mark.parametrize("name", WITH_SOLUTION)
def test_the_rate_is_the_spectral_radius_of_the_jacobian_at_the_solution(name: str) -> None:
    problem = WITH_SOLUTION[name](**double)
    radius = float(torch.linalg.eigvals(jacobian(problem, problem.solution)).abs().max())
    if problem.rate is None:
        assert name in ("monotone", "MLP", "mixer", "transformer", "convolution")
        assert radius > 0  # the state is not ignored
    else:
        assert problem.rate == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_samples_are_independent_of_one_another(name: str) -> None:
    problem = ALL[name](**double)
    z = problem.z0 + torch.randn(problem.z0.shape, dtype=torch.float64)
    blocks = jacobian(problem, z).view(3, z[0].numel(), 3, z[0].numel())
    for i in range(3):
        for j in range(3):
            assert (blocks[i, :, j].abs().max() > 0) == (i == j)
    index = torch.tensor([2])
    alone = tuple(cut(x, AUTOMATIC, 3, index) for x in problem.inputs)
    torch.testing.assert_close(problem.cell(z[index], *alone), problem.f(z)[index])


@pytest.mark.parametrize("name", ALL)
def test_a_seed_gives_the_same_problem_again_and_another_seed_another(name: str) -> None:
    torch.manual_seed(1)
    one = ALL[name](seed=5)
    torch.manual_seed(2)
    same, other = ALL[name](seed=5), ALL[name](seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, same.inputs, strict=True))
    assert torch.equal(one.z0, same.z0)
    assert not torch.equal(one.inputs[0], other.inputs[0])


@pytest.mark.parametrize("name", ALL)
def test_making_a_problem_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    ALL[name]()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ALL)
def test_a_problem_is_moved_to_another_type(name: str) -> None:
    problem = ALL[name](**double)
    moved = problem.to(torch.float32)
    tensors = [moved.z0, *moved.inputs, *([] if moved.solution is None else [moved.solution])]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert moved.f(moved.z0).dtype == torch.float32
    assert moved.rate == problem.rate
    assert moved.name == problem.name
    assert problem.z0.dtype == torch.float64  # the original stays
    if moved.solution is not None:
        assert (moved.residuals(moved.solution)[1] < 1e-5).all()
    assert all(torch.equal(a, b) for a, b in zip(moved.inputs, ALL[name]().inputs, strict=True))
    assert moved.to(device="meta").z0.device.type == "meta"
    assert moved.to(device="cpu").z0.dtype == torch.float32


def test_residuals_are_measured_sample_by_sample() -> None:
    problem = drift(batch=3, width=4, **double)
    residual, relative = problem.residuals(problem.inputs[0])  # f(x) = 2 x
    torch.testing.assert_close(residual, problem.inputs[0].norm(dim=1))
    torch.testing.assert_close(relative, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", WITHOUT_SOLUTION)
def test_a_problem_without_a_solution_has_no_fixed_point(name: str) -> None:
    problem = WITHOUT_SOLUTION[name](**double)
    assert problem.solution is None
    assert problem.rate is None
    for scale in (0.0, 0.5, 1.0, 10.0, 1e3):
        z = scale * torch.randn(problem.z0.shape, dtype=torch.float64)
        residual, _ = problem.residuals(z)
        # drift: the norm of x everywhere; explosion: z^2 - z + 1 is at least 3/4 in every number
        least = problem.inputs[0].norm(dim=1) * 0.999 if name == "drift" else torch.tensor(1.5)
        assert (residual >= least).all()


def test_iterates_of_an_explosion_overflow() -> None:
    assert (solve(explosion(), Picard(), max_steps=20).status == Status.DIVERGED).all()


def test_picard_goes_to_and_fro_between_two_points() -> None:
    problem = two_cycle(**double)
    z = problem.z0
    first, second = problem.f(z), problem.f(problem.f(z))
    assert not torch.allclose(first, z)
    torch.testing.assert_close(second, z)
    assert (solve(problem, Picard()).status == Status.STALLED).all()
    assert solve(problem, Picard(damping=0.5)).num_steps.tolist() == [1] * 4  # halfway is the solution


def test_picard_fails_on_a_monotone_operator_that_has_one_fixed_point() -> None:
    problem = monotone(width=12, **double)
    assert not solve(problem, Picard(), max_steps=300).converged.any()
    generator = torch.Generator().manual_seed(3)
    for size in (0.0, 1.0, 5.0):  # from every start the same
        z = size * torch.randn(problem.z0.shape, generator=generator, dtype=torch.float64)
        start = replace(problem, z0=z)
        damped = solve(start, Picard(damping=0.05), rtol=1e-6, max_steps=1000)  # forward-backward splitting
        torch.testing.assert_close(damped.value, problem.solution, rtol=1e-3, atol=1e-3)
    matrix = problem.inputs[1]
    symmetric = (matrix + matrix.T) / 2
    assert float(torch.linalg.eigvalsh(symmetric).max()) <= 0.9 + 1e-12  # monotone by `strength`


def test_picard_diverges_from_the_fixed_point_of_an_expanding_problem() -> None:
    problem = expanding(width=10, **double)
    assert (solve(problem, Picard()).status == Status.DIVERGED).all()
    found = solve(problem, Broyden())
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-7, atol=1e-7)


def test_a_nearly_singular_problem_has_one_eigenvalue_near_one() -> None:
    problem = nearly_singular(width=10, gap=1e-3, **double)
    values = torch.linalg.eigvalsh(problem.inputs[1])
    assert float(values[-1]) == pytest.approx(1 - 1e-3)
    assert float(values[-2]) <= 0.5


def test_residuals_of_a_non_normal_problem_grow_before_they_fall() -> None:
    def growth(non_normality: float) -> float:
        problem = linear(EVEN.abs(), batch=1, non_normality=non_normality, **double)
        trace = [float(problem.residuals(z)[0]) for z in iterates(problem, 40)]
        return max(trace) / trace[0]

    assert growth(0.0) <= 1
    assert growth(8.0) > 2


def iterates(problem: Problem, number: int) -> list[Tensor]:
    found = [problem.z0]
    for _ in range(number):
        found.append(problem.f(found[-1]))
    return found


def test_hard_samples_of_mixed_difficulty_take_more_steps() -> None:
    problem = mixed_difficulty(batch=6, width=9, easy=0.3, hard=0.94, num_hard=2, **double)
    steps = solve(problem, Picard(), max_steps=600).num_steps
    assert int(steps[:4].max()) < 25
    assert int(steps[4:].min()) > 200
    problem = mixed_difficulty(batch=6, num_hard=0)
    assert int(solve(problem, Picard(), rtol=1e-5).num_steps.max()) < 15


def test_more_injection_makes_a_normed_problem_easier() -> None:
    radius = [
        float(torch.linalg.eigvals(jacobian(problem, problem.solution)).abs().max())
        for problem in (mlp(batch=2, tokens=2, width=8, injection=i, **double) for i in (1.0, 3.0, 9.0))
    ]
    assert radius[0] > radius[1] > radius[2]


def test_the_suite_has_problems_of_the_sizes_it_promises() -> None:
    problems = suite()
    assert len({problem.name for problem in problems}) == len(problems)
    for problem in problems:
        assert 16_000 <= problem.z0.numel() <= 1_100_000, problem.name
        assert problem.z0.dtype == torch.float32, problem.name
        assert problem.solution.shape == problem.z0.shape, problem.name
    assert min(problem.z0.numel() for problem in problems) < 20_000
    assert max(problem.z0.numel() for problem in problems) > 1_000_000
    for problem in problems:
        assert (problem.residuals(problem.solution)[1] < 1e-5).all(), problem.name


def test_samples_of_a_problem_have_their_own_answers() -> None:
    whole = mixed_difficulty(batch=5, width=7, dtype=torch.float64)
    part = whole.samples([4, 1])
    assert whole.solution is not None
    assert part.solution is not None
    assert torch.equal(part.solution, whole.solution[[4, 1]])
    assert part.z0.shape == (2, 7)
    assert [x.shape for x in part.inputs] == [(2, 7), (2, 1), (7, 7)]  # the last one is shared
    assert float(part.residuals(part.solution)[1].max()) < 1e-12
    assert drift(batch=3).samples([0]).solution is None


def test_a_problem_that_records_gradients_has_inputs_of_its_own() -> None:
    plain = tanh_rnn(batch=2, width=5)
    recorded = plain.requiring_grad()
    assert all(x.requires_grad and x.is_leaf for x in recorded.inputs)
    for ours, theirs in zip(recorded.inputs, plain.inputs, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert not theirs.requires_grad
    assert recorded.f(plain.z0).requires_grad

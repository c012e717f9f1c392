from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import TIGHT, Problem, dense_gradients, problem, problems
from torch import Tensor
from waits import Waits, look_at_nothing

from deqlib import (
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    Picard,
    Solution,
    Solver,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.driver import iterate
from deqlib.solvers.gmres import GMRES, GMRESState
from deqlib.testing import SolverConformance
from deqlib.testing.strategies import contractions


class GMRESConformance(SolverConformance):
    """GMRES is for affine maps: on others it may stand still above a tight tolerance."""

    @settings(max_examples=20, suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data())
    def test_random_contractions_are_solved(self, data: Any) -> None:
        drawn = contractions(max_rate=self.contraction)
        affine = drawn.filter(lambda problem: problem.name in ("linear", "mixed difficulty"))
        self._check_solved(data.draw(affine))


class TestGMRES(GMRESConformance):
    solver = GMRES()


class TestGMRESOfLittleMemory(GMRESConformance):
    solver = GMRES(memory=4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nonsymmetric(seed: int, width: int, radius: float) -> Tensor:
    """A (D, D) of this spectral radius."""
    matrix = normal(seed, width, width)
    return matrix * (radius / float(torch.linalg.eigvals(matrix).abs().max()))


def symmetric(seed: int, spectrum: Tensor) -> Tensor:
    basis = torch.linalg.qr(normal(seed, len(spectrum), len(spectrum)))[0]
    return basis @ torch.diag(spectrum) @ basis.T


def affine(matrices: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """z -> A z + b with a matrix (D, D) for every sample."""
    return lambda z: torch.einsum("bij,bj->bi", matrices, z) + b


def states(f: Callable[[Tensor], Tensor], z: Tensor, solver: GMRES, evaluations: int) -> list[GMRESState]:
    """The solver's state after every evaluation."""
    state, seen = solver.init(z), []
    for _ in range(evaluations):
        z = next_point(solver, state, z)
        z, state = solver.step(z, f(z), state)
        seen.append(state)
    return seen


def next_point(solver: GMRES, state: GMRESState, z: Tensor) -> Tensor:
    """Where the map is evaluated next, which need not be the iterate."""
    query = solver.query(state)
    return z if query is None or query.point is None else query.point


def reference(matrix: Tensor, b: Tensor, evaluations: int) -> list[float]:
    """Residual norms of GMRES from zero after so many evaluations of z -> A z + b, by SciPy."""
    system, b = np.eye(len(b)) - matrix.numpy(), b.numpy()
    norms = [float(np.linalg.norm(b))]
    for inner in range(1, evaluations):
        x, _ = scipy.sparse.linalg.gmres(system, b, restart=inner, maxiter=1, rtol=0.0, atol=0.0)
        norms.append(float(np.linalg.norm(b - system @ x)))
    return norms


# On affine maps -----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), width=st.integers(2, 12), radius=st.floats(0.2, 30))
def test_residuals_are_those_of_gmres_step_by_step(seed: int, width: int, radius: float) -> None:
    matrices = torch.stack([nonsymmetric(seed + i, width, radius) for i in range(3)])
    b = normal(seed, 3, width)
    f = affine(matrices, b)
    seen = states(f, torch.zeros_like(b), GMRES(), width)
    for sample in range(3):
        expected = reference(matrices[sample], b[sample], width)
        for state, norm in zip(seen, expected, strict=True):
            true = (f(state.x) - state.x)[sample].norm()
            kept = state.residual[sample].norm()
            assert abs(float(true) - norm) <= 1e-7 * norm + 1e-10 * expected[0]
            assert abs(float(kept) - norm) <= 1e-7 * norm + 1e-10 * expected[0]


@given(seed=st.integers(0, 2**31), width=st.integers(1, 15), radius=st.floats(0.1, 10))
def test_as_many_columns_as_unknowns_end_the_solve(seed: int, width: int, radius: float) -> None:
    matrix, b = nonsymmetric(seed, width, radius), normal(seed, 1, width)
    regular = torch.linalg.cond(torch.eye(width, dtype=torch.float64) - matrix) < 1e4
    found = iterate(affine(matrix[None], b), torch.zeros_like(b), GMRES(), Stopping(rtol=1e-9, max_steps=200))
    if regular:
        assert found.converged.all()
        assert found.nfe <= width + 3  # the start, D columns, the solution; once more where rounding asks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1.5, 5.0, 100.0])
def test_maps_that_repel_picard_are_solved(radius: float, dtype: torch.dtype) -> None:
    matrices = torch.stack([nonsymmetric(seed, 15, radius) for seed in range(4)])
    b = normal(9, 4, 15)
    f, z0 = affine(matrices.to(dtype), b.to(dtype)), torch.zeros(4, 15, dtype=dtype)
    stopping = Stopping(rtol=1e-3 if dtype == torch.float32 else 1e-9, max_steps=60)
    assert not iterate(f, z0, Picard(), stopping).converged.any()
    found = iterate(f, z0, GMRES(), stopping)
    assert found.converged.all()
    exact = torch.linalg.solve(torch.eye(15, dtype=torch.float64) - matrices, b)
    assert (found.value - exact).norm() < 100 * (stopping.rtol or 0) * exact.norm()


@pytest.mark.parametrize("width", [2, 5, 9])
def test_a_space_that_conjugate_residuals_cannot_extend_is_extended(width: int) -> None:
    # (I - A) is a cyclic shift: every residual but the last is that of the start.
    shift = torch.roll(torch.eye(width, dtype=torch.float64), 1, 0)
    matrix = torch.eye(width, dtype=torch.float64) - shift
    b = torch.eye(1, width, dtype=torch.float64)
    seen = states(affine(matrix[None], b), torch.zeros_like(b), GMRES(), width + 1)
    norms = [float(state.residual.norm()) for state in seen]
    assert norms[:width] == pytest.approx([1.0] * width)
    assert norms[width] < 1e-12
    value = iterate(affine(matrix[None], b), torch.zeros_like(b), GMRES(), Stopping(rtol=1e-9)).value
    torch.testing.assert_close(value, b @ shift)


@given(seed=st.integers(0, 2**31), radius=st.floats(0.2, 30), memory=st.sampled_from([1, 3, 20]))
def test_images_are_those_of_the_directions_and_orthonormal(seed: int, radius: float, memory: int) -> None:
    matrices = torch.stack([nonsymmetric(seed + i, 12, radius) for i in range(2)])
    b = normal(seed, 2, 12)
    state = states(affine(matrices, b), torch.zeros_like(b), GMRES(memory=memory), 8)[-1]
    size = min(7, memory)
    p, q = state.directions[:, :size], state.images[:, :size]
    torch.testing.assert_close(p - torch.einsum("bij,bkj->bki", matrices, p), q, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        q @ q.mT, torch.eye(size, dtype=torch.float64).expand(2, -1, -1), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        q @ state.residual.unsqueeze(2), torch.zeros(2, size, 1).double(), rtol=0, atol=1e-8
    )


def test_a_full_memory_drops_its_oldest_column_and_the_residual_never_rises() -> None:
    matrices = torch.stack([nonsymmetric(seed, 40, 0.95) for seed in range(3)])
    b = normal(1, 3, 40)
    seen = states(affine(matrices, b), torch.zeros_like(b), GMRES(memory=4), 60)
    norms = torch.stack([state.residual.norm(dim=1) for state in seen])
    assert (norms[1:] <= norms[:-1] * (1 + 1e-12)).all()
    assert (norms[-1] < 1e-2 * norms[0]).all()
    full = states(affine(matrices, b), torch.zeros_like(b), GMRES(memory=60), 30)
    assert (full[-1].residual.norm(dim=1) < seen[29].residual.norm(dim=1)).all()


def test_a_new_column_takes_the_place_of_the_oldest() -> None:
    base = problem("linear", dim=30, contraction=0.95)
    z, solver = base.z0, GMRES(memory=4)
    state = solver.init(z)
    order = []
    for _ in range(15):
        before = state.images.clone()
        z = next_point(solver, state, z)
        z, state = solver.step(z, base.f(z), state)
        before = torch.nn.functional.pad(before, (0, 0, 0, state.images.shape[1] - before.shape[1]))
        order += (state.images != before).any(2).all(0).nonzero().flatten().tolist()
    assert order == [0, 1, 2, 3] * 3 + [0, 1]


@pytest.mark.parametrize("memory", [1, 2])
def test_on_symmetric_maps_a_short_memory_is_as_good_as_a_full_one(memory: int) -> None:
    # There conjugate residuals need the last direction only.
    matrix, b = symmetric(0, torch.linspace(-2, 0.8, 30, dtype=torch.float64)), normal(1, 1, 30)
    seen = states(affine(matrix[None], b), torch.zeros_like(b), GMRES(memory=memory), 15)
    for state, norm in zip(seen, reference(matrix, b[0], 15), strict=True):
        assert float(state.residual.norm()) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_size_of_the_solution_does_not_matter(scale: float) -> None:
    matrix, b = nonsymmetric(0, 10, 0.9)[None].float(), normal(1, 1, 10).float()
    stopping = Stopping(rtol=1e-5, max_steps=30)
    plain, scaled = (
        iterate(affine(matrix, b * s), torch.zeros_like(b), GMRES(), stopping) for s in (1, scale)
    )
    assert scaled.converged.all()
    assert scaled.nfe == plain.nfe
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-3, atol=1e-3)


def test_what_is_only_rounding_makes_no_column() -> None:
    x = normal(0, 2, 4)
    constant = states(lambda z: x + 0 * z, torch.zeros_like(x), GMRES(), 5)
    assert (constant[-1].images[:, :1].norm(dim=2) > 0.9).all()
    assert (constant[-1].images[:, 1:4] == 0).all()
    assert (constant[-1].directions[:, 1:4] == 0).all()
    drift = states(lambda z: z + x, torch.zeros_like(x), GMRES(), 5)
    assert (drift[-1].images[:, :4] == 0).all()


# A fixed number of steps --------------------------------------------------------------------------------


def residual(f: Callable[[Tensor], Tensor], solution: Solution) -> Tensor:
    return (f(solution.value) - solution.value).norm(dim=1)


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 8))
def test_fixed_steps_end_with_the_minimiser_where_picard_repels_and_a_picard_step_further_elsewhere(
    seed: int, steps: int
) -> None:
    matrices = torch.stack([symmetric(seed, torch.linspace(a, b, 12).double()) for a, b in RANGES])
    b = normal(seed, 3, 12)
    f, z0 = affine(matrices, b), torch.zeros_like(b)
    found = iterate(f, z0, GMRES(), Stopping.steps(steps))
    last = states(f, z0, GMRES(), steps)[-1]
    attracted = last.x + last.residual
    torch.testing.assert_close(found.value[0], attracted[0], rtol=1e-10, atol=1e-12)
    if steps > 1:  # the first Picard step is yet to be judged
        assert torch.equal(found.value[1:], last.x[1:])
        assert (residual(f, found)[1:] <= b.norm(dim=1)[1:]).all()


RANGES = [(-0.3, 0.3), (-9, -5), (-90, -30)]


def test_one_step_is_a_picard_step() -> None:
    base = problem()
    found = iterate(base.f, base.z0, GMRES(), Stopping.steps(1)).value
    assert torch.equal(found, base.f(base.z0))


def test_a_fixed_number_of_steps_never_waits_for_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look_at_nothing(monkeypatch)
    base = problem(dtype=torch.float32)
    with Waits() as waits:
        iterate(base.f, base.z0, GMRES(memory=3), Stopping.steps(8, measure=True))
    assert not waits.counts


def test_a_fixed_number_of_steps_compiles_without_a_graph_break() -> None:
    base = problem("linear", dtype=torch.float32)
    layer = ImplicitLayer(
        lambda z, x: base.cell(z, x, *base.inputs[1:]),
        solver=GMRES(memory=3),
        stopping=Stopping.steps(6),
    )
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(base.inputs[0]), layer(base.inputs[0]), rtol=1e-4, atol=1e-5)


# Samples by themselves ----------------------------------------------------------------------------------


def test_samples_that_the_driver_holds_do_not_spoil_the_others() -> None:
    matrices = torch.stack([nonsymmetric(seed, 12, radius) for seed, radius in enumerate((0.05, 0.9, 3.0))])
    b = normal(3, 3, 12)
    stopping = Stopping(rtol=1e-10, max_steps=40)
    together = iterate(affine(matrices, b), torch.zeros_like(b), GMRES(), stopping)
    assert together.num_steps[0] < together.num_steps[1]
    for sample in range(3):
        part = slice(sample, sample + 1)
        alone = iterate(affine(matrices[part], b[part]), torch.zeros_like(b[part]), GMRES(), stopping)
        assert alone.converged.all()
        assert alone.num_steps[0] == together.num_steps[sample]
        torch.testing.assert_close(alone.value, together.value[part], rtol=1e-9, atol=1e-9)


# Gradients ----------------------------------------------------------------------------------------------


@given(base=problems(dtype=torch.float64, max_contraction=0.9))
def test_adjoints_solved_by_it_give_the_exact_gradient(base: Problem) -> None:
    base = base.requiring_grad()
    g = normal(0, *base.z0.shape)
    stopping = Stopping(rtol=TIGHT, max_steps=100, patience=None)
    value = fixed_point(
        base.f,
        base.z0,
        stopping=Stopping(rtol=TIGHT, max_steps=500, patience=None),
        backward=ImplicitDifferentiation(solver=GMRES(), stopping=stopping),
        on_failure="ignore",
    ).value
    found = torch.autograd.grad(value, base.inputs, g)
    for ours, exact in zip(found, dense_gradients(base, g), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_an_adjoint_costs_a_product_for_every_unknown_where_picard_needs_many_more() -> None:
    base = problem("linear", batch=2, dim=6, contraction=0.95).requiring_grad()

    def gradient(solver: Solver) -> None:
        backward = ImplicitDifferentiation(solver=solver, stopping=Stopping(rtol=1e-8, max_steps=8))
        stopping = Stopping(rtol=1e-10, max_steps=100)
        settings = {"stopping": stopping, "backward": backward, "on_failure": "raise"}
        fixed_point(base.f, base.z0, **settings).value.sum().backward()

    gradient(GMRES())
    with pytest.raises(NonConvergenceError, match="adjoint"):
        gradient(Picard())


@pytest.mark.parametrize("memory", [1, 2, 20])
def test_unrolled_steps_can_be_differentiated_twice(memory: int) -> None:
    base = problem("tanh", batch=1, dim=3, contraction=0.6).requiring_grad()

    def value(*tensors: Tensor) -> Tensor:
        settings = {"solver": GMRES(memory=memory), "stopping": Stopping.steps(4), "backward": Unroll()}
        return fixed_point(base.cell, base.z0, tensors, **settings).value

    assert torch.autograd.gradcheck(value, base.inputs)
    assert torch.autograd.gradgradcheck(value, base.inputs)


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GMRES(memory=0), ValueError, "GMRES: memory must be at least 1, got 0"),
        (lambda: GMRES(memory=2.0), TypeError, "GMRES: memory must be an int"),
        (lambda: GMRES(5), TypeError, "positional"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()

from __future__ import annotations

import dataclasses
import warnings
from types import FunctionType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINDS, SOLVERS, Problem, lipschitz, problem, problems, solution_of
from torch import Tensor

import deqlib.solvers
from deqlib import (
    Anderson,
    Auto,
    Broyden,
    NewtonKrylov,
    Picard,
    Solver,
    Status,
    Stopping,
    fixed_point,
)
from deqlib.driver import iterate
from deqlib.testing import suite


def solve(base: Problem, solver: Solver, **stopping: Any) -> Any:
    settings = {"max_steps": 600, "patience": None, **stopping}
    with torch.no_grad():
        return fixed_point(base.f, base.z0, solver=solver, stopping=Stopping(**settings), on_failure="raise")


@pytest.mark.parametrize("name", SOLVERS)
@given(base=problems())
def test_every_solver_reaches_the_known_fixed_point_at_the_tolerance_asked(name: str, base: Problem) -> None:
    rtol = 1e-4 if base.z0.dtype == torch.float32 else 1e-9
    solution = solve(base, SOLVERS[name], rtol=rtol)
    exact = solution_of(base)
    distance = (solution.value - exact).norm(dim=1)
    rounding = 20 * torch.finfo(base.z0.dtype).eps * exact.norm(dim=1)
    assert (distance <= (solution.residual.double() + rounding) / (1 - lipschitz(base))).all()
    assert (solution.relative_residual <= rtol).all()
    residual, _ = base.residuals(solution.value)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-3, atol=float(rounding.max()))


@given(
    base=problems(dtype=torch.float64, max_contraction=0.8),
    memory=st.integers(1, 12),
    ridge=st.sampled_from([1e-12, 1e-7, 1e-2, 1.0]),
    damping=st.floats(0.3, 1.0),
)
def test_anderson_reaches_the_fixed_point_with_any_settings(
    base: Problem, memory: int, ridge: float, damping: float
) -> None:
    solution = solve(base, Anderson(memory=memory, ridge=ridge, damping=damping), rtol=1e-9)
    torch.testing.assert_close(solution.value, solution_of(base), rtol=1e-7, atol=1e-7)


@given(base=problems(dtype=torch.float64, max_contraction=0.7), memory=st.integers(1, 12))
def test_broyden_reaches_the_fixed_point_with_any_memory(base: Problem, memory: int) -> None:
    solution = solve(base, Broyden(memory=memory), rtol=1e-9)
    torch.testing.assert_close(solution.value, solution_of(base), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("damping", [0.25, 1.0])
def test_picard_takes_the_damped_step(damping: float) -> None:
    base = problem()
    z = iterate(base.f, base.z0, Picard(damping=damping), Stopping.steps(2)).value
    expected = base.z0
    for _ in range(2):
        expected = (1 - damping) * expected + damping * base.f(expected)
    torch.testing.assert_close(z, expected, rtol=1e-14, atol=0)


# Anderson -----------------------------------------------------------------------------------------------


@given(dim=st.integers(1, 8), extra=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_anderson_ends_a_linear_problem_in_one_step_more_than_its_dimension(
    dim: int, extra: int, seed: int
) -> None:
    base = problem("linear", batch=2, dim=dim, contraction=0.9, seed=seed)
    solution = solve(base, Anderson(memory=dim + extra, ridge=0.0), rtol=1e-6)
    assert (solution.num_steps <= dim + 1).all()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_anderson_is_gmres_on_a_linear_problem(num_steps: int) -> None:
    # Walker & Ni 2011, theorem 2.2: the iterate after k + 1 steps is f at GMRES's iterate k.
    base = problem("linear", batch=1, dim=7, contraction=0.9)
    z = iterate(base.f, base.z0, Anderson(memory=10, ridge=0.0), Stopping.steps(num_steps + 1)).value
    a = torch.eye(7, dtype=torch.float64) - base.inputs[1].T
    krylov = [base.inputs[0][0]]
    for _ in range(num_steps - 1):
        krylov.append(a @ krylov[-1])
    basis = torch.linalg.qr(torch.stack(krylov, 1))[0]
    gmres = basis @ torch.linalg.lstsq(a @ basis, base.inputs[0][0].unsqueeze(1)).solution
    torch.testing.assert_close(z, base.f(gmres.T), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [0.5, 1.0])
@pytest.mark.parametrize("memory", [1, 2, 4])
def test_an_anderson_step_solves_the_least_squares_problem_of_its_history(
    memory: int, damping: float
) -> None:
    base = problem("mlp", batch=1, dim=8, contraction=0.9)
    solver = Anderson(memory=memory, ridge=0.0, damping=damping)
    z, state = base.z0, solver.init(base.z0)
    images, errors = [], []
    for _ in range(10):
        fz = base.f(z)
        images.append(fz[0])
        errors.append((fz - z)[0])
        expected = images[-1] - (1 - damping) * errors[-1]
        if len(errors) > 1:
            df = torch.stack(images[-memory - 1 :], 1).diff()
            dr = torch.stack(errors[-memory - 1 :], 1).diff()
            gamma = torch.linalg.lstsq(dr, errors[-1].unsqueeze(1)).solution
            remaining = errors[-1] - (dr @ gamma)[:, 0]
            expected = images[-1] - (df @ gamma)[:, 0] - (1 - damping) * remaining
        z, state = solver.step(z, fz, state)
        torch.testing.assert_close(z[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory", [1, 2, 5])
def test_andersons_matrices_are_those_of_its_history_before_and_after_wrapping(
    memory: int, grad: bool, kind: str
) -> None:
    base = problem("mlp", dim=8, contraction=0.95).requiring_grad()
    solver = Anderson(memory=memory, kind=kind, ridge=0.0)
    with torch.set_grad_enabled(grad):
        z, state = base.z0, solver.init(base.z0)
        images, lefts = [], []
        for step in range(12):
            fz = base.f(z)
            images.append(fz)
            lefts.append(fz - z if kind == "II" else z)
            z, state = solver.step(z, fz, state)
            assert state.history.count == step
            full = min(step, memory)  # the oldest of a full history has just given its slot away
            for age in range(1, full if step >= memory else full + 1):
                slot = (step - age) % memory
                for rows, values in ((state.history.df, images), (state.history.left, lefts)):
                    torch.testing.assert_close(
                        rows[:, slot], values[-age - 1] - values[-age], rtol=1e-12, atol=1e-15
                    )
            held = [(step - age) % memory for age in range(1, full if step >= memory else full + 1)]
            left, df = state.history.left[:, held], state.history.df[:, held]
            dr = left if kind == "II" else df - left
            found = state.history.system.matrix[:, held][:, :, held]
            torch.testing.assert_close(found, left @ dr.mT, rtol=1e-7, atol=1e-14)


def test_andersons_ridge_means_the_same_at_every_size_of_the_residual() -> None:
    base = problem("linear", batch=1, dim=6, contraction=0.9)
    far, near = (
        iterate(lambda z, s=s: s * base.f(z / s), base.z0, Anderson(ridge=0.1), Stopping.steps(6)).value / s
        for s in (1.0, 2.0**-40)
    )
    torch.testing.assert_close(far, near, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anderson_takes_a_picard_step_where_its_history_is_singular(dtype: torch.dtype) -> None:
    solver = Anderson(ridge=0.0)
    a = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=dtype)  # of norm 5, so that scaling is exact
    z, state = torch.zeros(2, 2, dtype=dtype), solver.init(a)
    for residual in (a, 2 * a, 3 * a):  # differences of residuals: twice the same
        fz = z + residual
        z, state = solver.step(z, fz, state)
    assert torch.equal(z, fz)


# Broyden ------------------------------------------------------------------------------------------------


class DenseBroyden:
    """B, by the rank-one updates of the last `memory` pairs applied to -I in turn."""

    def __init__(self, memory: int, dim: int) -> None:
        self.memory, self.dim, self.pairs = memory, dim, []

    def add(self, dz: Tensor, dr: Tensor) -> None:
        self.pairs = [*self.pairs, (dz, dr)][-self.memory :]

    @property
    def matrix(self) -> Tensor:
        b = -torch.eye(self.dim, dtype=torch.float64)
        for dz, dr in self.pairs:
            b = b + torch.outer(dz - b @ dr, dz @ b) / (dz @ b @ dr)
        return b


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory", [1, 2, 3, 30])
def test_a_broyden_step_is_that_of_the_dense_method_on_the_pairs_it_holds(memory: int, grad: bool) -> None:
    base = problem("mlp", batch=2, dim=8, contraction=0.95).requiring_grad()
    solver = Broyden(memory=memory, growth=float("inf"))
    dense = [DenseBroyden(memory, 8) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        z, state, before = base.z0, solver.init(base.z0), None
        for _ in range(9):
            fz = base.f(z)
            residual = fz - z
            z_next, state = solver.step(z, fz, state)
            for i, b in enumerate(dense):
                if before is not None:
                    dz, dr = (z - before[0])[i].detach(), (residual - before[1])[i].detach()
                    b.add(dz, dr)
                    torch.testing.assert_close(b.matrix @ dr, dz, rtol=1e-7, atol=1e-10)  # newest secant
                expected = z[i] - b.matrix @ residual[i]
                torch.testing.assert_close(z_next[i], expected, rtol=1e-6, atol=1e-9)
            before, z = (z, residual), z_next


def test_broyden_with_enough_memory_is_the_dense_method() -> None:
    base = problem("mlp", batch=1, dim=6, contraction=0.9)
    solver = Broyden(memory=20)
    z, state = base.z0, solver.init(base.z0)
    dense_z, b, last = base.z0[0], -torch.eye(6, dtype=torch.float64), None
    for _ in range(9):
        r = base.f(dense_z.unsqueeze(0))[0] - dense_z
        if last is not None:
            dz, dr = dense_z - last[0], r - last[1]
            b = b + torch.outer(dz - b @ dr, dz @ b) / (dz @ b @ dr)
        last = dense_z, r
        dense_z = dense_z - b @ r
        z, state = solver.step(z, base.f(z), state)
        torch.testing.assert_close(z[0], dense_z, rtol=1e-7, atol=1e-9)


@given(dim=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_broyden_ends_a_linear_problem_in_twice_its_dimension(dim: int, seed: int) -> None:
    # Gay 1979, SIAM J. Numer. Anal. 16(4): at most 2 D steps; here after the Picard step that starts it.
    base = problem("linear", batch=2, dim=dim, contraction=0.7, seed=seed)
    solution = solve(base, Broyden(memory=2 * dim + 2), rtol=1e-6)
    assert (solution.num_steps <= 2 * dim + 1).all()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
def test_a_fixed_point_that_repels_picard_is_reached(solver: Solver) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    scale = torch.tensor([-3.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    f = lambda z: scale * z + x  # noqa: E731
    picard = fixed_point(f, torch.zeros_like(x), solver=Picard(), on_failure="ignore")
    assert (picard.status == Status.DIVERGED).all()
    solution = fixed_point(
        f, torch.zeros_like(x), solver=solver, stopping=Stopping(rtol=1e-9), on_failure="raise"
    )
    torch.testing.assert_close(solution.value, x / (1 - scale), rtol=1e-7, atol=1e-7)


# Both ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("solver", [Anderson(memory=11), Broyden(memory=11)], ids=["anderson", "broyden"])
def test_a_history_takes_memory_as_it_grows_and_no_more_than_it_can_use(solver: Solver, grad: bool) -> None:
    for dim in (2, 30):
        base = problem(dim=dim, contraction=0.95).requiring_grad()
        z, state = base.z0, solver.init(base.z0)
        most = min(11, solver.most_columns(dim))
        assert state.history.memory == most
        sizes = []
        with torch.set_grad_enabled(grad):
            for step in range(15):
                z, state = solver.step(z, base.f(z), state)
                history = state.history
                slots = history.df.shape[1]
                assert history.left.shape[1] == slots
                assert history.system.matrix.shape[1:] == (slots, slots)
                # Room for what there is, the pending values included, and no more than twice that.
                assert min(step + 1, most) <= slots <= min(2 * step + 1, most)
                sizes.append(slots)
        assert sizes == sorted(sizes)
        assert sizes[-1] == most


@pytest.mark.parametrize(
    ("memory", "budget", "width", "most"),
    [
        (25, 1000, 40, 25),
        (25, 1000, 50, 20),
        (25, 1000, 500, 10),
        (8, 1000, 500, 8),
        (25, 1, 7, 8),
        (25, 1, 50, 10),
    ],
)
def test_a_budget_bounds_what_a_history_of_large_samples_takes(
    memory: int, budget: int, width: int, most: int
) -> None:
    solver, base = Anderson(memory=memory, budget=budget), problem(dim=width, contraction=0.95)
    z, state = base.z0, solver.init(base.z0)
    for _ in range(memory + 2):
        z, state = solver.step(z, base.f(z), state)
    assert state.history.df.shape[1] == state.history.left.shape[1] == most
    with pytest.raises(ValueError, match="budget"):
        Anderson(budget=0)


@pytest.mark.parametrize("solver", [Anderson(memory=9), Broyden(memory=9)], ids=["anderson", "broyden"])
def test_columns_stay_where_they_are_when_room_is_made(solver: Solver) -> None:
    base = problem(dim=30, contraction=0.95)
    z, state = base.z0, solver.init(base.z0)
    for _ in range(8):
        before = [rows.clone() for rows in (state.history.df, state.history.left)]
        made = state.history.count  # columns that are finished
        z, state = solver.step(z, base.f(z), state)
        for rows, old in zip((state.history.df, state.history.left), before, strict=True):
            assert torch.equal(rows[:, :made], old[:, :made])


def test_a_method_is_abstract_or_final() -> None:
    # What `Solver` itself offers by default is the exception: those methods are there to be replaced once.
    found = []
    for solver in (getattr(deqlib.solvers, name) for name in deqlib.solvers.__all__):
        owners: dict[str, list[type]] = {}
        for owner in solver.__mro__:
            for name, member in vars(owner).items():
                is_own = owner.__module__.startswith("deqlib.") and owner is not Solver
                written = isinstance(member, FunctionType | property) and not name.startswith("__")
                if is_own and written and not getattr(member, "__isabstractmethod__", False):
                    owners.setdefault(name, []).append(owner)
        found += [f"{solver.__name__}.{name}: {o}" for name, o in owners.items() if len(o) > 1]
    assert not found


# Laws of all solvers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("scale", [2.0**-27, 2.0**27], ids=["1e-8", "1e8"])
def test_units_do_not_matter(solver: Solver, kind: str, dtype: torch.dtype, scale: float) -> None:
    base = problem(kind, contraction=0.8, dtype=dtype)
    stopping = Stopping(rtol=1e-4 if dtype == torch.float32 else 1e-9, max_steps=200)
    one = iterate(base.f, base.z0, solver, stopping)
    other = iterate(lambda z: scale * base.f(z / scale), base.z0, solver, stopping)
    assert torch.equal(one.num_steps, other.num_steps)
    assert torch.equal(one.status, other.status)
    torch.testing.assert_close(other.value / scale, one.value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_step_keeps_a_sample_that_is_not_finite_to_itself(solver: Solver, bad: float) -> None:
    base = problem(batch=3)
    results = []
    for value in (0.5, bad):
        z, state = base.z0, solver.init(base.z0)
        for step in range(15):
            fz = base.f(z)
            if step >= 2:
                fz[1] = value
            z, state = solver.step(z, fz, state)
        results.append(z[[0, 2]])
    assert torch.equal(*results)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_beyond_convergence_stay_at_the_fixed_point(solver: Solver, dtype: torch.dtype) -> None:
    base = problem(dtype=dtype)
    solution = iterate(base.f, base.z0, solver, Stopping.steps(300, measure=True))
    assert (solution.relative_residual < 100 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_constant_map_is_solved_in_one_step(solver: Solver) -> None:
    target = torch.randn(3, 4, dtype=torch.float64)
    step = getattr(solver, "damping", 1.0)
    solution = fixed_point(lambda z: target, torch.zeros_like(target), solver=solver, on_failure="raise")
    if step == 1:
        assert solution.num_steps.tolist() == [1, 1, 1]
    torch.testing.assert_close(solution.value, target, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Picard(damping=0.0), ValueError, r"Picard: damping must be in \(0, 1\], got 0.0"),
        (lambda: Picard(damping=float("nan")), ValueError, "Picard: damping"),
        (lambda: Picard(damping="1"), TypeError, r"Picard: damping must be a number, got '1' \(str\)"),
        (lambda: Picard(damping=True), TypeError, "Picard: damping"),
        (lambda: Anderson(memory=0), ValueError, "Anderson: memory must be at least 1, got 0"),
        (lambda: Anderson(memory=2.0), TypeError, "Anderson: memory must be an int, got 2.0"),
        (lambda: Anderson(memory=True), TypeError, "Anderson: memory must be an int, got True"),
        (lambda: Anderson(ridge=-1e-9), ValueError, "Anderson: ridge"),
        (lambda: Anderson(damping=1.1), ValueError, "Anderson: damping"),
        (lambda: Broyden(memory=0), ValueError, "Broyden: memory must be at least 1, got 0"),
        (lambda: Broyden(memroy=3), TypeError, "memroy"),
        (lambda: Anderson(5), TypeError, "positional"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_settings_cannot_be_changed() -> None:
    for solver in SOLVERS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.memory = 3


# Peers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["anderson", "broyden1", "newton_krylov"])
def test_scipy_finds_the_same_fixed_point(kind: str, method: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    base = problem(kind, batch=1, dim=6, contraction=0.7)
    f = lambda z: (base.f(torch.from_numpy(z).unsqueeze(0))[0]).numpy() - z  # noqa: E731
    found = getattr(optimize, method)(f, base.z0[0].numpy(), f_tol=1e-10)
    for solver in (Anderson(), Anderson(kind="I"), Broyden(), NewtonKrylov(), Auto()):
        ours = solve(base, solver, rtol=1e-11).value[0]
        torch.testing.assert_close(ours, torch.from_numpy(found), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fixed_point_iter", "anderson", "broyden"])
def test_torchdeq_finds_the_same_fixed_point(kind: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq")
        base = problem(kind, dim=6, contraction=0.6)
        deq = torchdeq.get_deq(f_solver=name, f_max_iter=200, f_tol=1e-9, f_stop_mode="abs")
        deq.eval()
        with torch.no_grad():
            theirs = deq(base.f, base.z0)[0][-1]
    for solver in (Anderson(), Anderson(kind="I"), Broyden(), NewtonKrylov(), Auto()):
        ours = solve(base, solver, rtol=1e-11).value
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [0, 3, 5, 9])
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_torchdeq_agrees_on_the_problems_of_the_suite(name: str, index: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq.solver")
    base = suite()[index]
    their_solver = torchdeq.get_solver(name)
    with torch.no_grad():
        theirs = their_solver(base.f, base.z0, max_iter=150, tol=1e-4, stop_mode="rel")[0]
        ours = fixed_point(
            base.cell, base.z0, base.inputs, stopping=Stopping(rtol=1e-5, max_steps=150), on_failure="raise"
        ).value
    # A residual of 1e-4 leaves an error of up to 1e-4 / (1 - rate); the rates go up to 0.99.
    distance = (theirs - ours).flatten(1).norm(dim=1) / ours.flatten(1).norm(dim=1)
    reached = base.residuals(theirs)[1] <= 2e-4
    assert reached.any() or name == "anderson"
    assert (distance[reached] < 0.02).all()

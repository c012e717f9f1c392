from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINDS, SOLVERS, Problem, Spy, problem, problems, sample_of, solution_of
from torch import Tensor

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitDifferentiation,
    PhantomGradient,
    Picard,
    Solution,
    Solver,
    Status,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.driver import iterate
from deqlib.solvers.base import Query, Seen

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True)
class Counter(Solver):
    """Moves every sample to the number of the step, so an iterate names the step that made it."""

    def init(self, z0: Tensor) -> int:
        return 0

    def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
        return torch.full_like(z, state + 1.0), state + 1


def scripted(script: list[list[float]]) -> Spy:
    """A map whose residual at iterate k of sample b is script[b][k]; f(z) - z is what is scripted."""
    table = torch.tensor(script, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return z + table.gather(1, z.long())

    return Spy(f)


def run(script: list[list[float]], **stopping: Any) -> tuple[Solution, Spy]:
    f = scripted(script)
    settings = {"rtol": 0.0, "atol": 1.0, "max_steps": len(script[0]) - 1, **stopping}
    z0 = torch.zeros(len(script), 1, dtype=torch.float64)
    return iterate(f, z0, Counter(), Stopping(**settings)), f


def names(solution: Solution) -> list[str]:
    return [Status(code).name for code in solution.status.tolist()]


def test_every_sample_ends_at_its_own_step_with_its_own_status() -> None:
    solution, f = run(
        [
            [8.0, 4.0, 0.5, 9.0, 9.0, 9.0, 9.0],  # converges at step 2
            [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0],  # still on its way at the last step
            [5.0, 2.0, 3.0, 3.0, 3.0, 0.1, 0.1],  # not better for three steps after step 1
            [5.0, 9.0, 2.0, 4e6, 0.1, 0.1, 0.1],  # a million times its best at step 3
            [5.0, 4.0, NAN, 0.1, 0.1, 0.1, 0.1],
            [5.0, 4.0, 3.0, INF, 0.1, 0.1, 0.1],
            [1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0],  # at its fixed point already
        ],
        patience=3,
    )
    assert names(solution) == [
        "CONVERGED",
        "MAX_STEPS",
        "STALLED",
        "DIVERGED",
        "DIVERGED",
        "DIVERGED",
        "CONVERGED",
    ]
    assert solution.num_steps.tolist() == [2, 6, 4, 3, 2, 3, 0]
    assert solution.value.flatten().tolist() == [2, 6, 1, 2, 1, 2, 0]  # the best iterate of each
    assert solution.residual.tolist() == [0.5, 3.0, 2.0, 2.0, 4.0, 3.0, 1.0]
    assert solution.nfe == f.count == 7


def test_the_best_iterate_is_returned_not_the_last() -> None:
    solution, _ = run([[5.0, 2.0, 4.0, 3.0, 9.0]])
    assert names(solution) == ["MAX_STEPS"]
    assert solution.value.item() == 1
    assert solution.residual.item() == 2


def test_a_sample_is_returned_where_it_met_the_tolerance_even_if_a_residual_was_smaller_before() -> None:
    scale = torch.tensor([1.0, 100.0], dtype=torch.float64)
    residual = torch.tensor([0.5, 0.9], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:  # the iterates are 0 and 1, the images 0.5 and 100
        return torch.where(z == 0, residual[0] * scale[0], scale[1]).to(z.dtype)

    @dataclass(frozen=True, kw_only=True)
    class Jump(Counter):
        def step(self, z: Tensor, fz: Tensor, state: int) -> tuple[Tensor, int]:
            return torch.full_like(z, float(scale[1] - residual[1])), state + 1

    solution = iterate(f, torch.zeros(1, 1, dtype=torch.float64), Jump(), Stopping(rtol=0.01, max_steps=1))
    assert names(solution) == ["CONVERGED"]
    assert solution.residual.item() == pytest.approx(0.9)
    assert solution.value.item() == pytest.approx(99.1)


def test_the_tolerance_is_absolute_plus_relative() -> None:
    def f(z: Tensor) -> Tensor:
        return torch.full_like(z, 10.0)  # residual 10 - z, scale 10

    for z0, converged in ((8.99, False), (9.01, True)):
        start = torch.full((1, 1), z0, dtype=torch.float64)
        solution = iterate(f, start, Counter(), Stopping(rtol=0.05, atol=0.5, max_steps=1))
        assert (int(solution.num_steps) == 0) == converged


def test_what_is_reported_of_a_finished_sample_is_what_its_value_gave_last() -> None:
    calls = []

    def f(z: Tensor) -> Tensor:  # residuals shrink from call to call, as those of a cell with noise may
        calls.append(None)
        return z + torch.tensor([[0.8], [8.0]], dtype=torch.float64) / len(calls)

    solution = iterate(f, torch.zeros(2, 1).double(), Counter(), Stopping(rtol=0, atol=1, max_steps=20))
    assert solution.num_steps.tolist() == [0, 7]
    assert solution.residual.tolist() == pytest.approx([0.1, 1.0])
    assert solution.value.flatten().tolist() == [0, 7]
    assert solution.trace[:, 0].tolist() == pytest.approx([1.0] * 8)  # f(0) is the residual there


@pytest.mark.parametrize("image", [INF, -INF, NAN])
def test_a_first_image_that_is_not_finite_is_divergence_not_convergence(image: float) -> None:
    solution = iterate(lambda z: torch.full_like(z, image), torch.ones(2, 3), Picard(), Stopping())
    assert names(solution) == ["DIVERGED"] * 2
    assert torch.equal(solution.value, torch.ones(2, 3))
    assert solution.nfe == 1


def test_numbers_too_large_for_their_norm_are_divergence_not_convergence() -> None:
    solution = iterate(lambda z: 1e25 * z, torch.ones(1, 4), Picard(), Stopping(blowup=1e30))
    assert names(solution) == ["DIVERGED"]


def test_a_fixed_point_at_the_origin_has_relative_residual_zero() -> None:
    solution = iterate(lambda z: 0 * z, torch.zeros(2, 3), Picard(), Stopping())
    assert solution.relative_residual.tolist() == [0, 0]
    assert solution.converged.all()


def test_blow_up_compares_with_the_best_residual() -> None:
    solution, _ = run([[5.0, 2.0, 19.0, 1.5, 21.0, 0.1]], blowup=10.0)
    assert names(solution) == ["DIVERGED"]
    assert solution.num_steps.item() == 4
    assert solution.value.item() == 3


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_counts_steps_since_the_best(patience: int) -> None:
    solution, _ = run([[5.0, 4.0, 3.0] + [6.0] * 8], patience=patience)
    assert names(solution) == ["STALLED"]
    assert solution.num_steps.item() == 2 + patience
    assert solution.value.item() == 2


def test_without_patience_a_sample_goes_on_to_the_last_step() -> None:
    solution, _ = run([[2.0] + [6.0] * 40], patience=None)
    assert names(solution) == ["MAX_STEPS"]
    assert solution.num_steps.item() == 40


@given(
    script=st.lists(
        st.lists(st.sampled_from([0.5, 2.0, 3.0, 4.0, 5.0, 1e7, NAN, INF]), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    check_every=st.integers(2, 12),
    patience=st.sampled_from([None, 2, 3]),
)
def test_looking_less_often_changes_no_value_and_no_status(
    script: list[list[float]], check_every: int, patience: int | None
) -> None:
    often, _ = run(script, patience=patience)
    seldom, f = run(script, patience=patience, check_every=check_every)
    for name in ("value", "residual", "num_steps", "status"):
        torch.testing.assert_close(
            getattr(often, name), getattr(seldom, name), rtol=0, atol=0, equal_nan=True
        )
    assert seldom.nfe == f.count
    assert often.nfe <= seldom.nfe <= min(often.nfe + check_every - 1, 9)


def test_looking_less_often_evaluates_up_to_the_next_look() -> None:
    script = [[8.0, 4.0, 0.5] + [0.5] * 8]
    assert [run(script, check_every=n)[0].nfe for n in (1, 2, 3, 5, 100)] == [3, 3, 4, 6, 11]


def test_the_trace_holds_every_relative_residual_and_repeats_the_value_of_a_sample_that_ended() -> None:
    solution, f = run([[8.0, 4.0, 0.5, 9.0, 9.0], [9.0, 8.0, 7.0, 6.0, 5.0], [5.0, 1e9, 0.1, 0.1, 0.1]])
    assert solution.trace.shape == (5, 3)
    expected = torch.tensor(
        [
            [8 / 8, 9 / 9, 5 / 5],
            [4 / 5, 8 / 9, 1e9 / (1e9 + 1)],
            [0.5 / 2.5, 7 / 9, 1],
            [0.2, 6 / 9, 1],
            [0.2, 5 / 9, 1],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(solution.trace, expected)
    assert torch.equal(solution.trace[-1], solution.relative_residual)
    assert f.count == 5


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finished_samples_never_move_again(solver: Solver, dtype: torch.dtype) -> None:
    base = problem(batch=5, dtype=dtype)
    z0 = base.z0.clone()
    z0[1] = solution_of(base)[1].to(dtype)  # at its fixed point
    speed = torch.tensor([0.1, 0.5, 0.8, 1.0, 1.6], dtype=dtype).unsqueeze(1)  # the last one is slow

    def cell(z: Tensor) -> Tensor:
        image = speed * base.f(z)
        return torch.cat([image[:2], image[2:3] + torch.where(z[2:3].abs().sum() > 0, NAN, 0.0), image[3:]])

    f = Spy(cell)
    stopping = Stopping(rtol=1e-5, max_steps=60, patience=None)
    solution = fixed_point(f, z0, solver=solver, stopping=stopping, backward=Unroll(), on_failure="ignore")
    assert len(set(solution.num_steps.tolist())) > 2  # else nothing is tested
    for sample, steps in enumerate(solution.num_steps.tolist()):
        for state in f.states[steps + 1 : len(solution.trace)]:  # a step that a gradient is of comes after
            assert torch.equal(state[sample], solution.value[sample])
    assert names(solution)[2] == "DIVERGED"


BACKWARDS = [
    JFB(),
    PhantomGradient(steps=3),
    PhantomGradient(form="neumann"),
    ImplicitDifferentiation(),
    Unroll(),
]


@pytest.mark.parametrize("backward", BACKWARDS, ids=lambda b: f"{type(b).__name__}-{getattr(b, 'form', '')}")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(memory=3)], ids=["picard", "anderson", "broyden"]
)
def test_reported_evaluations_and_residuals_equal_those_recounted(
    backward: Any, grad: bool, solver: Solver
) -> None:
    base = problem("mlp").requiring_grad()
    f = Spy(base.f)
    with torch.set_grad_enabled(grad):
        solution = fixed_point(f, base.z0, solver=solver, stopping=Stopping(rtol=1e-6), backward=backward)
    assert solution.nfe == f.count
    residual, relative = base.residuals(solution.value)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.relative_residual, relative, rtol=1e-6, atol=0)
    assert (relative <= 1e-6).all()
    assert solution.value.requires_grad == grad
    assert not any(
        getattr(solution, name).requires_grad for name in ("residual", "relative_residual", "trace")
    )
    assert len(solution.trace) == int(solution.num_steps.max()) + 1
    extra = {JFB: 1, ImplicitDifferentiation: 1, Unroll: 0}.get(type(backward))
    if extra is None:
        extra = 1 if backward.form == "neumann" else backward.steps
    assert solution.nfe - len(solution.trace) == (extra if grad else 0)


@pytest.mark.parametrize("max_steps", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_reported_residuals_are_those_of_the_value_when_steps_run_out(solver: Solver, max_steps: int) -> None:
    base = problem(contraction=0.8)
    f = Spy(base.f)
    solution = fixed_point(
        f, base.z0, solver=solver, stopping=Stopping(rtol=1e-12, max_steps=max_steps), on_failure="ignore"
    )
    assert names(solution) == ["MAX_STEPS"] * 3
    assert solution.nfe == f.count == max_steps + 2  # one more on the tape
    torch.testing.assert_close(solution.residual, base.residuals(solution.value)[0], rtol=1e-9, atol=0)
    assert (solution.residual < base.residuals(base.z0)[0]).all()  # better than the starting point


def _solve(base: Problem, solver: Solver) -> Solution:
    stopping = Stopping(rtol=1e-7, max_steps=300)
    with torch.no_grad():
        return fixed_point(base.f, base.z0, solver=solver, stopping=stopping, on_failure="ignore")


@pytest.mark.parametrize("name", SOLVERS)
@given(base=problems(dtype=torch.float64, max_contraction=0.8))
def test_a_sample_alone_is_solved_as_in_its_batch(name: str, base: Problem) -> None:
    together = _solve(base, SOLVERS[name])
    for sample in range(len(base.z0)):
        alone = _solve(sample_of(base, sample), SOLVERS[name])
        assert alone.status[0] == together.status[sample]
        assert alone.num_steps[0] == together.num_steps[sample]
        torch.testing.assert_close(alone.value[0], together.value[sample], rtol=1e-9, atol=1e-9)


TROUBLE = ["nan", "inf", "diverges", "jumps to infinity", "at its fixed point"]


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_troubled_batch_mate_changes_nothing_for_the_others(
    solver: Solver, kind: str, trouble: str
) -> None:
    base = problem(kind, batch=4)
    last = torch.arange(4).unsqueeze(1) == 3

    def cell(z: Tensor) -> Tensor:
        image = base.f(z)
        match trouble:
            case "nan":
                other = image + NAN
            case "inf":
                other = image + INF
            case "diverges":
                other = -50 * z + 1 + z**2
            case "jumps to infinity":
                other = torch.where(z.abs().amax(1, keepdim=True) > 0.1, INF, image)
            case _:
                other = z
        return torch.where(last, other, image)

    stopping = Stopping(rtol=1e-8, max_steps=100)
    healthy = fixed_point(base.f, base.z0, solver=solver, stopping=stopping)
    mixed = fixed_point(cell, base.z0, solver=solver, stopping=stopping, on_failure="ignore")
    for name in ("value", "status", "num_steps", "residual", "relative_residual"):
        assert torch.equal(getattr(mixed, name)[:3], getattr(healthy, name)[:3]), name
    steps = int(healthy.num_steps[:3].max())
    if trouble != "diverges":  # Broyden finds a fixed point of this one, later than the others theirs
        assert mixed.nfe == steps + 1 + 1
        assert names(mixed)[3] == ("CONVERGED" if trouble == "at its fixed point" else "DIVERGED")
    assert mixed.value.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("stopping", [Stopping(), Stopping.steps(3), Stopping.steps(3, measure=True)])
def test_an_empty_batch_is_solved(solver: Solver, stopping: Stopping) -> None:
    x = torch.zeros(0, 4, requires_grad=True)
    solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros(0, 4), solver=solver, stopping=stopping)
    assert solution.value.shape == (0, 4)
    assert solution.status.shape == solution.num_steps.shape == (0,)
    solution.value.sum().backward()
    assert x.grad.shape == (0, 4)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_fixed_steps_evaluate_once_a_step_and_measure_nothing(solver: Solver, num_steps: int) -> None:
    base = problem()
    f = Spy(base.f)
    plain = iterate(f, base.z0, solver, Stopping.steps(num_steps))
    assert plain.nfe == f.count == num_steps
    assert plain.residual is plain.relative_residual is plain.trace is None
    assert plain.num_steps.tolist() == [num_steps] * 3
    assert names(plain) == ["COMPLETED"] * 3

    measured = iterate(f, base.z0, solver, Stopping.steps(num_steps, measure=True))
    assert measured.nfe == num_steps + 1
    assert f.count == 2 * num_steps + 1
    assert torch.equal(measured.value, plain.value)
    residual, relative = base.residuals(measured.value)
    torch.testing.assert_close(measured.residual, residual, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(measured.relative_residual, relative, rtol=1e-9, atol=1e-14)
    assert measured.trace.shape == (num_steps + 1, 3)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_fixed_number_of_steps_takes_the_steps_of_a_tolerance_solve(solver: Solver) -> None:
    base = problem(batch=1, contraction=0.8)
    solution = iterate(base.f, base.z0, solver, Stopping(rtol=1e-6, max_steps=100))
    fixed = iterate(base.f, base.z0, solver, Stopping.steps(int(solution.num_steps)))
    assert torch.equal(solution.value, fixed.value)


def test_fixed_steps_return_the_last_iterate_even_if_it_is_worse() -> None:
    solution = iterate(lambda z: 3 * z + 1, torch.zeros(1, 1), Picard(), Stopping.steps(3))
    assert solution.value.item() == 13


@pytest.mark.parametrize("solver", [Anderson(), Broyden(memory=3)], ids=["anderson", "broyden"])
def test_autocast_is_for_the_cell_the_solver_keeps_the_precision_of_the_state(solver: Solver) -> None:
    base = problem("linear", dim=8, contraction=0.9, dtype=torch.float32)

    def cell(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return base.f(z)

    plain = iterate(cell, base.z0, solver, Stopping.steps(9, measure=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = iterate(cell, base.z0, solver, Stopping.steps(9, measure=True))
    assert torch.equal(plain.trace, cast.trace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Auto()], ids=["picard", "anderson", "auto"])
def test_what_becomes_of_a_sample_hangs_neither_on_the_batch_nor_on_when_the_host_looks(
    solver: Solver, batch: int, dtype: torch.dtype
) -> None:
    gain = torch.tensor([0.05, 0.9, 0.97], dtype=dtype).repeat(batch // 3 + 1)[:batch].unsqueeze(1)
    blows = (torch.arange(batch) % 3 == 1).unsqueeze(1)

    def f(z: Tensor) -> Tensor:
        return torch.where(blows & (z > 7), NAN, gain * z + 1)

    found = [
        iterate(f, torch.zeros_like(gain), solver, Stopping(rtol=1e-5, max_steps=60, check_every=every))
        for every in (1, 5, 6, 8)
    ]
    assert names(found[0])[1] == "DIVERGED"
    for other in found[1:]:
        assert names(other) == names(found[0])
        assert torch.equal(other.num_steps, found[0].num_steps)
    if batch > 3:
        few = iterate(
            lambda z: torch.where(blows[:3] & (z > 7), NAN, gain[:3] * z + 1),
            torch.zeros_like(gain[:3]),
            solver,
            Stopping(rtol=1e-5, max_steps=60),
        )
        assert names(few) == names(found[0])[:3]
        assert torch.equal(few.num_steps, found[0].num_steps[:3])


def test_a_residual_that_is_the_goal_to_the_last_bit_meets_it_in_a_batch_of_any_size() -> None:
    rtol = 0.0206
    residual = torch.tensor(rtol)
    for _ in range(20):  # in float32 the residual at 1 is rtol times the norm of the image, rounded
        residual = torch.add(torch.zeros(()), 1 + residual, alpha=rtol)
    step = torch.add(torch.tensor(1.0), residual) - 1

    def f(z: Tensor) -> Tensor:
        return torch.where(z == 0, torch.ones_like(z), torch.where(z == 1, z + step, z + step / 2))

    for batch in (1, 64, 65):
        solution = iterate(f, torch.zeros(batch, 1), Picard(), Stopping(rtol=rtol, max_steps=3))
        assert solution.num_steps.tolist() == [1] * batch


def test_refused_steps_of_finished_samples_are_not_counted() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Complains(Picard):
        def observe(self, seen: Seen, state: Any) -> Any:
            seen.note("complaint", torch.ones_like(seen.since, dtype=torch.bool))
            return state

    gain = torch.tensor([[0.01], [0.5]], dtype=torch.float64)
    rule = Stopping(rtol=1e-6, max_steps=60)
    together = iterate(lambda z: gain * z + 1, torch.zeros_like(gain), Complains(), rule)
    for index in range(2):
        own = gain[index : index + 1]
        alone = iterate(lambda z, own=own: own * z + 1, torch.zeros_like(own), Complains(), rule)
        assert alone.rejections["complaint"][0] == together.rejections["complaint"][index]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda z: z, "Slips.step: must return the next iterate, a tensor, and the state, got Tensor"),
        (lambda z: None, "Slips.step: must return .* got NoneType"),
        (
            lambda z: (z[:, :1], None),
            r"Slips.step: the next iterate must be like z, \(2, 3\) in torch.float32",
        ),
        (lambda z: (z.double(), None), r"got \(2, 3\) in torch.float64"),
    ],
)
def test_a_solver_that_slips_is_named(made: Any, words: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Slips(Picard):
        def step(self, z: Tensor, fz: Tensor, state: Any) -> Any:
            return made(z)

    with pytest.raises((TypeError, ValueError), match=words):
        iterate(lambda z: z / 2 + 1, torch.zeros(2, 3), Slips(), Stopping())


def test_a_query_that_says_who_gets_a_product_without_a_direction_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Asks(Picard):
        def query(self, state: Any) -> Query:
            return Query(wanted=torch.ones(2, dtype=torch.bool))

    with pytest.raises(ValueError, match="wanted"):
        iterate(lambda z: z / 2 + 1, torch.zeros(2, 3), Asks(), Stopping())

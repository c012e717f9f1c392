# ruff: noqa: D102  # the name of a test says what it is about
"""A test suite that every solver can inherit (needs pytest and hypothesis).

```python
from deqlib.testing import SolverConformance

class TestMySolver(SolverConformance):
    solver = MySolver()
```

The tests are those of the contract in `deqlib.Solver`. Class attributes say what a solver does not
promise; a test that does not apply at all can be overridden.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..backward import Backward, ImplicitDifferentiation, Unroll
from ..driver import iterate
from ..fixed_point import fixed_point
from ..solution import Solution, Status
from ..solvers import Solver
from ..solvers.base import Query, Seen
from ..state import AUTOMATIC, cut
from ..stopping import Stopping
from .problems import (
    Problem,
    convolution,
    drift,
    expanding,
    explosion,
    linear,
    mixed_difficulty,
    mlp,
    tanh_rnn,
    two_cycle,
)
from .strategies import contractions

_NAN, _INF = float("nan"), float("inf")

# Subclasses run the same function on objects of their own, which hypothesis would take for a mistake.
_property = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors])

_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

# Contractions at small sizes, of the given rate where the constructor knows it. Seeds leave no rate above it.
_SOLVABLE: dict[str, Callable[[float, torch.dtype], Problem]] = {
    "linear": lambda rate, dtype: linear(_spread(rate, 24), dtype=dtype),
    "non-normal": lambda rate, dtype: linear(_spread(rate, 24), non_normality=0.5, dtype=dtype),
    "tanh": lambda rate, dtype: tanh_rnn(width=24, rate=rate, dtype=dtype),
    "mixed": lambda rate, dtype: mixed_difficulty(
        batch=6, width=24, easy=0.3 * rate, hard=rate, num_hard=2, dtype=dtype
    ),
    "mlp": lambda rate, dtype: mlp(batch=3, tokens=4, width=12, gain=0.6, injection=3.0, dtype=dtype),
    "convolution": lambda rate, dtype: convolution(
        batch=2, channels=4, side=4, gain=0.5, injection=3.0, dtype=dtype
    ),
}

# Problems that need not be solved.
_HARD: dict[str, Callable[[torch.dtype], Problem]] = {
    "two-cycle": lambda dtype: two_cycle(dtype=dtype),
    "drift": lambda dtype: drift(dtype=dtype),
    "explosion": lambda dtype: explosion(dtype=dtype),
    "expanding": lambda dtype: expanding(width=12, dtype=dtype),
    "strongly expanding": lambda dtype: expanding(width=12, rate=1e3, dtype=dtype),
}


class SolverConformance:
    """What every solver must do. Subclass it under a name that starts with `Test` and set `solver`.

    Attributes:
        solver: the one under test.
        max_steps: steps that it may need for the hardest problem it must solve.
        contraction: spectral radius of that problem, in (0, 1).
        rtol: relative residual it must reach, for states of float32 and of float64.
        differentiable: whether `Unroll` gives its exact gradient at convergence. Gradients on the tape
            must be finite in any case.
        resume_allowance: steps that a resumed solve may take more than a fresh one.
    """

    solver: ClassVar[Solver]
    max_steps: ClassVar[int] = 400
    contraction: ClassVar[float] = 0.8
    rtol: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-4, torch.float64: 1e-9}
    differentiable: ClassVar[bool] = True
    resume_allowance: ClassVar[int] = 0

    # What it finds --------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [(name, torch.float32) for name in _SOLVABLE]
        + [(name, torch.float64) for name in ("linear", "tanh", "mlp")],
    )
    def test_known_fixed_points_are_reached_at_the_tolerance_asked(
        self, name: str, dtype: torch.dtype
    ) -> None:
        self._check_solved(_SOLVABLE[name](self.contraction, dtype))

    @_property
    @given(data=st.data())
    def test_random_contractions_are_solved(self, data: Any) -> None:
        self._check_solved(data.draw(contractions(max_rate=self.contraction)))

    def _check_solved(self, problem: Problem) -> None:
        dtype = problem.z0.dtype
        rtol, eps = self.rtol[dtype], torch.finfo(dtype).eps
        found = self._solve(problem)
        assert found.converged.all(), (
            f"{problem.name}: all samples should converge to rtol={rtol:g} within {self.max_steps} steps, "
            f"got {found}; {self._knobs('max_steps', 'contraction', 'rtol')}"
        )
        _check_residual(problem, found)
        assert found.relative_residual is not None
        assert (found.relative_residual <= rtol).all(), (
            f"{problem.name}: relative residuals {found.relative_residual.tolist()} exceed rtol={rtol}"
        )
        assert problem.solution is not None
        error = (found.value - problem.solution).flatten(1).norm(dim=1)
        allowed = 50 * (rtol + eps) / (1 - self.contraction) * problem.solution.flatten(1).norm(dim=1)
        assert (error <= allowed).all(), (
            f"{problem.name}: errors {error.tolist()} are too large, allowed {allowed.tolist()}"
        )

    @_dtypes
    @pytest.mark.parametrize("name", _HARD)
    def test_a_problem_it_cannot_solve_ends_with_a_status_and_a_finite_value_no_worse_than_the_start(
        self, name: str, dtype: torch.dtype
    ) -> None:
        problem = _HARD[name](dtype)
        found = self._solve(problem, rtol=self.rtol[dtype], max_steps=40, patience=25)
        assert found.value.isfinite().all(), f"{name}: the best iterate should be finite, got {found.value}"
        statuses = {Status(code) for code in found.status.tolist()}
        assert Status.COMPLETED not in statuses, f"{name}: COMPLETED is for a fixed number of steps"
        _check_no_worse(problem, found)
        if problem.solution is None:
            assert Status.CONVERGED not in statuses, f"{name} has no fixed point, got {found}"

    @pytest.mark.parametrize("max_steps", [1, 2])
    def test_a_few_steps_give_a_result_no_worse_than_the_start_and_are_counted_exactly(
        self, max_steps: int
    ) -> None:
        for make in _SOLVABLE.values():
            problem, evaluations = make(self.contraction, torch.float32), _Counter()
            counted = dataclasses.replace(problem, cell=evaluations.of(problem.cell))
            found = self._solve(counted, rtol=0.0, max_steps=max_steps)
            assert found.nfe == evaluations.number == max_steps + 1, (
                f"{problem.name}: {max_steps} steps should take {max_steps + 1} evaluations, "
                f"reported {found.nfe}, counted {evaluations.number}"
            )
            assert found.num_steps.tolist() == [max_steps] * len(problem.z0)
            _check_residual(problem, found)
            _check_no_worse(problem, found)

    @_dtypes
    def test_a_constant_map_is_solved(self, dtype: torch.dtype) -> None:
        target = _normal(4, 5, dtype=dtype)
        problem = Problem("constant", lambda z: target + 0 * z, torch.zeros_like(target), (), target)
        found = self._solve(problem)
        assert found.converged.all(), (
            f"f(z) = c should be solved, got {found}; {self._knobs('max_steps', 'rtol')}"
        )

    @pytest.mark.parametrize("batch", [0, 1])
    @pytest.mark.parametrize("rule", ["to a tolerance", "fixed steps", "fixed steps, measured"])
    def test_a_batch_of_no_or_one_sample_is_solved(self, rule: str, batch: int) -> None:
        x, rate = _normal(batch, 5), 0.5 * self.contraction
        stopping = Stopping.steps(4, measure=rule == "fixed steps, measured")
        if rule == "to a tolerance":
            stopping = Stopping(rtol=self.rtol[torch.float64], max_steps=self.max_steps, patience=None)
        with torch.no_grad():
            found = fixed_point(
                lambda z: rate * z + x,
                torch.zeros_like(x),
                solver=self.solver,
                stopping=stopping,
                on_failure="ignore",
            )
        assert found.value.shape == x.shape
        assert found.status.shape == (batch,)
        if not stopping.is_fixed:
            assert found.converged.all(), (
                f"f(z) = {rate:g} z + x should be solved, got {found}; "
                f"{self._knobs('max_steps', 'contraction', 'rtol')}"
            )

    def test_half_precision_states_stay_finite_and_end_with_a_status(self) -> None:
        for name in ("linear", "mlp"):
            problem = _SOLVABLE[name](self.contraction, torch.bfloat16)
            found = self._solve(problem, rtol=1e-4, max_steps=60, patience=25)  # beyond bfloat16
            assert found.value.dtype == torch.bfloat16
            assert found.value.isfinite().all(), f"{name}: the value should be finite, got {found}"
            assert found.relative_residual is not None
            assert (found.relative_residual < 0.5).all(), (
                f"{name}: should come nearer in 60 steps, got {found}; {self._knobs('contraction')}"
            )

    # Samples by themselves ------------------------------------------------------------------------------

    @_property
    @given(data=st.data())
    def test_a_sample_alone_is_solved_as_in_its_batch(self, data: Any) -> None:
        problem = data.draw(contractions(max_rate=self.contraction, dtypes=[torch.float64]))
        together = self._solve(problem, rtol=1e-7)
        for sample in range(len(problem.z0)):
            alone = self._solve(_samples(problem, [sample]), rtol=1e-7)
            self._check_same(alone, _rows(together, [sample]), f"sample {sample} alone and in its batch")

    @_property
    @given(data=st.data(), seed=st.integers(0, 99))
    def test_the_order_of_the_samples_does_not_matter(self, data: Any, seed: int) -> None:
        problem = data.draw(contractions(max_rate=self.contraction, dtypes=[torch.float64]))
        order = torch.randperm(len(problem.z0), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = _rows(self._solve(problem, rtol=1e-7), order)
        self._check_same(
            self._solve(_samples(problem, order), rtol=1e-7), expected, f"samples in the order {order}"
        )

    @pytest.mark.parametrize(
        "trouble", ["nan", "inf", "huge", "nan later", "inf later", "diverges", "at rest"]
    )
    def test_a_troubled_batch_mate_changes_nothing_for_the_others(self, trouble: str) -> None:
        problem = tanh_rnn(width=6, rate=0.75 * self.contraction, dtype=torch.float64)
        last = torch.arange(4).unsqueeze(1) == 3

        def cell(z: Tensor, *inputs: Any) -> Tensor:
            image = problem.cell(z, *inputs)
            away = z.abs().amax(1, keepdim=True) > 0.3
            match trouble:
                case "nan" | "inf":
                    other = image + float(trouble)
                case "huge":
                    other = image * 1e300
                case "nan later":
                    other = torch.where(away, _NAN, image)
                case "inf later":
                    other = torch.where(away, _INF, image)
                case "diverges":
                    other = z.square() + 50 * z + 1  # no fixed point near, none that attracts
                case _:
                    other = z
            return torch.where(last, other, image)

        healthy = self._solve(problem, rtol=1e-6)
        mixed = self._solve(dataclasses.replace(problem, cell=cell), rtol=1e-6)
        assert mixed.value.isfinite().all(), f"the best iterates should be finite, got {mixed.value}"
        others = [0, 1, 2]
        self._check_same(_rows(mixed, others), _rows(healthy, others), "beside a troubled sample", exact=True)
        if trouble in ("nan", "inf", "nan later", "inf later"):
            assert mixed.status[3] == Status.DIVERGED, f"should be DIVERGED, got {mixed}"

    @pytest.mark.parametrize("bad", [_NAN, _INF, -_INF, 1e300, 1e-300])
    def test_a_step_keeps_a_sample_that_is_not_finite_to_itself(self, bad: float) -> None:
        problem = tanh_rnn(batch=3, width=6, rate=0.75 * self.contraction, dtype=torch.float64)
        row = torch.arange(3).unsqueeze(1) == 1
        values = []
        for value in (_NAN, bad):
            evaluations = _Counter()
            spoilt = _spoilt(evaluations.of(problem.f), row, evaluations, value)
            with torch.no_grad():
                values.append(iterate(spoilt, problem.z0, self.solver, Stopping.steps(15)).value[[0, 2]])
        assert torch.equal(*values), f"rows beside one of {bad} should be those beside one of NaN"
        assert values[1].isfinite().all(), f"rows beside one of {bad} should be finite, got {values[1]}"

    @pytest.mark.parametrize("check_every", [3, 1000])
    def test_looking_seldom_changes_no_value_and_no_status(self, check_every: int) -> None:
        problem = _SOLVABLE["mixed"](self.contraction, torch.float64)
        often = self._solve(problem, rtol=1e-5, max_steps=40)
        seldom = self._solve(problem, rtol=1e-5, max_steps=40, check_every=check_every)
        self._check_same(seldom, often, f"with check_every={check_every}", exact=True)

    def test_finished_samples_may_leave_the_batch(self) -> None:
        problem = _SOLVABLE["mixed"](self.contraction, torch.float64)
        full, compact = self._solve(problem, rtol=1e-6), self._solve(problem, rtol=1e-6, compact=True)
        self._check_same(compact, full, "with compact=True")
        assert (compact.sample_nfe <= full.sample_nfe).all(), "a compact solve should not evaluate more"

    # The state ------------------------------------------------------------------------------------------

    def test_the_state_lives_outside_of_the_solver(self) -> None:
        outer = _SOLVABLE["tanh"](self.contraction, torch.float64)
        inner = _SOLVABLE["linear"](self.contraction, torch.float64)

        def solve(problem: Problem) -> Solution:
            return self._solve(problem, rtol=0.0, max_steps=8)

        def cell(z: Tensor, *inputs: Any) -> Tensor:
            self._check_same(solve(inner), inner_expected, "a solve within another", exact=True)
            return outer.cell(z, *inputs)

        before = copy.deepcopy(_attributes(self.solver))
        expected, inner_expected = solve(outer), solve(inner)
        interrupted = solve(dataclasses.replace(outer, cell=cell))
        self._check_same(interrupted, expected, "a solve with others in between", exact=True)
        self._check_same(solve(outer), expected, "the same solve again", exact=True)
        assert _attributes(self.solver) == before, f"a solve should not change {self.solver}"

    def test_settings_are_frozen_and_compare_by_value(self) -> None:
        solver = self.solver
        assert dataclasses.is_dataclass(solver), "a solver should be a dataclass of its settings"
        fields = dataclasses.fields(solver)
        assert all(field.kw_only for field in fields), "settings should be keyword-only"
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            solver.setting_of_the_conformance_suite = 1
        same = dataclasses.replace(solver)
        assert same == solver, f"solvers of the same settings should be equal, got {same} and {solver}"
        assert hash(same) == hash(solver), "equal solvers should have equal hashes"
        assert copy.deepcopy(solver) == solver

    @pytest.mark.parametrize("steps", [0, 1, 2, 12])
    def test_every_tensor_of_the_state_has_the_batch_first(self, steps: int) -> None:
        problem = _SOLVABLE["tanh"](self.contraction, torch.float64)
        with torch.no_grad():
            found = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps))
        for tensor in _tensors(found.state):
            assert tensor.shape[:1] == (len(problem.z0),), (
                f"tensors of the state should be (B, ...) with B = {len(problem.z0)}, "
                f"got shape {tuple(tensor.shape)} after {steps} steps"
            )

    @_dtypes
    def test_a_step_keeps_shape_and_dtype(self, dtype: torch.dtype) -> None:
        problem = _SOLVABLE["linear"](self.contraction, dtype)
        for steps in (1, 2, 5):
            with torch.no_grad():
                value = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps)).value
            assert value.shape == problem.z0.shape
            assert value.dtype == dtype, f"iterates should stay {dtype}, got {value.dtype}"

    @pytest.mark.parametrize("grad", [False, True], ids=["off the tape", "on the tape"])
    def test_neither_an_iterate_nor_an_image_is_written_to(self, grad: bool) -> None:
        problem = _SOLVABLE["tanh"](self.contraction, torch.float64)
        inputs = tuple(x.detach().clone().requires_grad_(grad) for x in problem.inputs)
        solver, z = self.solver, problem.z0.clone()
        seen: list[tuple[str, Tensor, Tensor]] = []

        def f(z: Tensor) -> Tensor:
            return problem.cell(z, *inputs)

        with torch.set_grad_enabled(grad):
            state = solver.init(z)
            for step in range(12):
                query = solver.query(state)
                if query is not None and query.point is not None:
                    z = query.point
                image = f(z)
                if query is not None and query.direction is not None:
                    product = torch.func.jvp(f, (z,), (query.direction,))[1]
                    wanted = query.wanted
                    image = product if wanted is None else torch.where(wanted.unsqueeze(1), product, image)
                seen.append((f"z of step {step}", z, z.detach().clone()))
                seen.append((f"f(z) of step {step}", image, image.detach().clone()))
                z, state = solver.step(z, image, state)
                for what, tensor, before in seen:
                    assert torch.equal(tensor.detach(), before), (
                        f"{what} was written to in step {step}; the cell or the driver may still hold it"
                    )

    def test_what_it_is_told_is_not_written_to(self) -> None:
        problem = _SOLVABLE["mixed"](self.contraction, torch.float64)
        names = ("difference", "residual", "goal", "before", "since", "best", "improved", "finished")
        solver, observed = self.solver, _Observed(self.solver)

        def check(seen: Seen, state: Any) -> Any:
            told = {name: getattr(seen, name) for name in names}
            before = {name: tensor.clone() for name, tensor in told.items() if tensor is not None}
            state = solver.observe(seen, state)
            for name, tensor in before.items():
                assert torch.equal(told[name], tensor), f"seen.{name} was written to by observe"
            return state

        observed.check = check
        with torch.no_grad():
            iterate(problem.f, problem.z0, observed, Stopping(rtol=1e-5, max_steps=self.max_steps))

    @pytest.mark.parametrize("steps", [0, 1, 7])
    def test_a_fixed_number_of_steps_evaluates_exactly_that_often(self, steps: int) -> None:
        problem = _SOLVABLE["tanh"](self.contraction, torch.float64)
        evaluations = _Counter()
        f = evaluations.of(problem.f)
        with torch.no_grad():
            plain = iterate(f, problem.z0, self.solver, Stopping.steps(steps))
            assert plain.nfe == evaluations.number == steps, (
                f"{steps} steps took {evaluations.number} evaluations, {plain.nfe} were reported"
            )
            measured = iterate(f, problem.z0, self.solver, Stopping.steps(steps, measure=True))
        assert measured.nfe == evaluations.number - steps == steps + 1
        assert torch.equal(measured.value, plain.value), "measuring the residual should not change the value"
        _check_residual(problem, measured)

    # Nothing left to learn ------------------------------------------------------------------------------

    @_dtypes
    def test_a_sample_at_its_fixed_point_stays_there(self, dtype: torch.dtype) -> None:
        centre = torch.arange(12, dtype=dtype).view(3, 4) / 4

        def f(z: Tensor) -> Tensor:  # exact at its fixed point
            return centre + (z - centre) / 2

        with torch.no_grad():
            solved = iterate(f, centre, self.solver, Stopping())
            assert solved.num_steps.tolist() == [0, 0, 0]
            assert torch.equal(solved.value, centre)
            moved = iterate(f, centre, self.solver, Stopping.steps(30)).value
        torch.testing.assert_close(
            moved, centre, msg=lambda text: f"30 steps should not leave a fixed point: {text}"
        )

    @_dtypes
    def test_steps_beyond_convergence_stay_at_the_fixed_point(self, dtype: torch.dtype) -> None:
        problem = _SOLVABLE["tanh"](0.5 * self.contraction, dtype)  # an easy one: it is over early
        steps = max(100, self.max_steps // 4)
        with torch.no_grad():
            found = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps, measure=True))
        assert found.relative_residual is not None
        limit = 1e3 * torch.finfo(dtype).eps
        assert (found.relative_residual < limit).all(), (
            f"after {steps} steps relative residuals should be below {limit:.0e}, "
            f"got {found.relative_residual.tolist()}; {self._knobs('max_steps', 'contraction')}"
        )

    @_dtypes
    @pytest.mark.parametrize("name", ["constant", "at rest", "drift", "two-cycle", "steps"])
    def test_singular_histories_neither_raise_nor_overflow(self, name: str, dtype: torch.dtype) -> None:
        x = _normal(3, 4, dtype=dtype)
        f: Callable[[Tensor], Tensor] = {
            "constant": lambda z: x + 0 * z,  # iterates repeat
            "at rest": lambda z: z,  # residuals are zero
            "drift": lambda z: z + x,  # residuals are the same for ever
            "two-cycle": lambda z: 2 * x - z,  # iterates repeat every other step
            "steps": lambda z: (2 * (z / 2 + x)).round() / 2,  # differences are zero or large
        }[name]
        with torch.no_grad():
            for stopping in (Stopping.steps(20), Stopping(rtol=0.0, max_steps=20)):
                value = iterate(f, torch.zeros_like(x), self.solver, stopping).value
                assert value.isfinite().all(), f"{name}: the value should be finite, got {value}"

    # Gradients ------------------------------------------------------------------------------------------

    def test_gradients_through_the_steps_are_finite(self) -> None:
        problem = _SOLVABLE["linear"](self.contraction, torch.float64)
        x, matrix = (t.detach().clone() for t in problem.inputs)
        x[0] = 0  # this sample is at its fixed point from the start: every difference is zero
        for stopping in (Stopping.steps(30), Stopping(rtol=1e-9, max_steps=self.max_steps)):
            inputs = (x.clone().requires_grad_(), matrix.clone().requires_grad_())
            value = self._tracked(problem, inputs, Unroll(), stopping)
            for gradient in torch.autograd.grad(value.sum(), inputs):
                assert gradient.isfinite().all(), f"gradients should be finite with {stopping}"

    @pytest.mark.parametrize("name", ["tanh"])
    def test_the_gradient_through_the_steps_is_that_of_the_fixed_point(self, name: str) -> None:
        if not self.differentiable:
            pytest.skip("`differentiable` is False: not promised")
        self._check_gradient(name, Unroll(), 1e-5, "differentiable")

    @pytest.mark.parametrize("name", ["mlp"])
    def test_it_solves_adjoints(self, name: str) -> None:
        stopping = Stopping(rtol=1e-9, max_steps=self.max_steps, patience=None)
        mode = ImplicitDifferentiation(solver=self.solver, stopping=stopping)
        self._check_gradient(name, mode, 1e-6, "max_steps", "contraction")

    def test_recording_changes_no_value(self) -> None:
        problem = _SOLVABLE["tanh"](self.contraction, torch.float64)
        plain = self._solve(problem, rtol=1e-7)
        inputs = tuple(x.detach().clone().requires_grad_() for x in problem.inputs)
        recorded = fixed_point(
            problem.cell,
            problem.z0,
            inputs,
            solver=self.solver,
            stopping=Stopping(rtol=1e-7, max_steps=self.max_steps, patience=None),
            backward=Unroll(),
        )
        recorded = dataclasses.replace(recorded, value=recorded.value.detach())
        self._check_same(recorded, plain, "on the tape and off it")

    def _check_gradient(self, name: str, backward: Backward, rtol: float, *knobs: str) -> None:
        problem = _SOLVABLE[name](self.contraction, torch.float64)
        inputs = tuple(x.detach().clone().requires_grad_() for x in problem.inputs)
        weights = _normal(*problem.z0.shape)
        stopping = Stopping(rtol=1e-12, max_steps=self.max_steps, patience=None)
        value = self._tracked(problem, inputs, backward, stopping)
        assert value.requires_grad, f"{name}: no gradient comes through; {self._knobs(*knobs)}"
        found = torch.autograd.grad((value * weights).sum(), inputs)
        for gradient, expected in zip(found, _exact_gradients(problem, inputs, weights), strict=True):
            error = float((gradient - expected).norm() / expected.norm())
            assert error <= rtol, (
                f"{name}: relative error of a gradient {error:.1e}, allowed {rtol:.0e}; {self._knobs(*knobs)}"
            )

    def _tracked(
        self, problem: Problem, inputs: tuple[Tensor, ...], backward: Backward, stopping: Stopping
    ) -> Tensor:
        """The fixed point with its graph."""
        value: Tensor = fixed_point(
            problem.cell,
            problem.z0,
            inputs,
            solver=self.solver,
            stopping=stopping,
            backward=backward,
            on_failure="ignore",
        ).value
        return value

    # Going on -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ["linear", "tanh"])
    def test_going_on_after_a_small_change_takes_no_more_steps_than_a_fresh_solve(self, name: str) -> None:
        problem = _SOLVABLE[name](self.contraction, torch.float64)
        before = self._solve(problem, rtol=1e-6)
        x, *rest = problem.inputs
        changed = dataclasses.replace(
            problem, inputs=(x + 1e-3 * _normal(*x.shape), *rest), z0=before.value, solution=None
        )
        fresh, resumed = (self._solve(changed, rtol=1e-6, state=state) for state in (None, before.state))
        assert resumed.converged.all(), (
            f"the resumed solve should converge, got {resumed}; {self._knobs('max_steps', 'contraction')}"
        )
        _check_residual(changed, resumed)
        limit = int(fresh.num_steps.max()) + self.resume_allowance
        assert int(resumed.num_steps.max()) <= limit, (
            f"with what was learnt {int(resumed.num_steps.max())} steps, without it "
            f"{int(fresh.num_steps.max())}; let resume() keep less, or {self._knobs('resume_allowance')}"
        )

    def test_a_state_of_another_batch_is_refused_or_not_used(self) -> None:
        spectrum = _spread(0.5 * self.contraction, 6)
        state = self._solve(linear(spectrum, batch=3, dtype=torch.float64)).state
        other = linear(spectrum, batch=5, dtype=torch.float64)
        try:
            found = self._solve(other, state=state)
        except ValueError:
            return
        assert found.converged.all(), (
            f"a state that does not fit should not be used, got {found}; "
            f"{self._knobs('max_steps', 'contraction', 'rtol')}"
        )

    # Tools ----------------------------------------------------------------------------------------------

    def _knobs(self, *names: str) -> str:
        """What to do about a failure of what a solver need not promise."""
        now = [f"`{name}` (now {getattr(self, name)})" for name in names]
        return f"if the solver does not promise this, change {' or '.join(now)} on the test class"

    def _solve(self, problem: Problem, *, compact: bool = False, state: Any = None, **rule: Any) -> Solution:
        """Off the tape, to the tolerance of the dtype unless `rule` has fields of `Stopping`."""
        defaults = {"rtol": self.rtol.get(problem.z0.dtype), "max_steps": self.max_steps, "patience": None}
        with torch.no_grad():
            return fixed_point(
                problem.cell,
                problem.z0,
                problem.inputs,
                solver=self.solver,
                stopping=Stopping(**{**defaults, **rule}),
                on_failure="ignore",
                compact=compact,
                state=state,
            )

    def _check_same(self, found: Solution, expected: Solution, what: str, *, exact: bool = False) -> None:
        """Same statuses, steps and values: to the last bit, or but for rounding."""
        assert found.status.tolist() == expected.status.tolist(), (
            f"{what}: statuses {found.status.tolist()} should be {expected.status.tolist()}"
        )
        assert found.num_steps.tolist() == expected.num_steps.tolist(), (
            f"{what}: steps {found.num_steps.tolist()} should be {expected.num_steps.tolist()}"
        )
        if exact:
            assert torch.equal(found.value, expected.value), f"{what}: values should be equal to the last bit"
        else:
            torch.testing.assert_close(
                found.value, expected.value, rtol=1e-7, atol=1e-7, msg=lambda text: f"{what}: {text}"
            )


class _Observed(Solver):
    """Another solver, with something else in place of its `observe`."""

    def __init__(self, solver: Solver) -> None:
        self.solver, self.check = solver, solver.observe

    def init(self, z0: Tensor) -> Any:
        return self.solver.init(z0)

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.solver.step(z, fz, state)

    def observe(self, seen: Seen, state: Any) -> Any:
        return self.check(seen, state)

    def query(self, state: Any) -> Query | None:
        return self.solver.query(state)


class _Counter:
    """Counts evaluations."""

    number = 0

    def of(self, cell: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same cell, counted."""

        def counted(*args: Any) -> Tensor:
            self.number += 1
            return cell(*args)

        return counted


def _spread(rate: float, width: int) -> Tensor:
    return torch.linspace(-rate, rate, width, dtype=torch.float64)


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _spoilt(
    f: Callable[[Tensor], Tensor], row: Tensor, evaluations: _Counter, value: float
) -> Callable[[Tensor], Tensor]:
    """The map with one row that is `value` from the third evaluation on."""

    def image(z: Tensor) -> Tensor:
        good = f(z)
        return torch.where(row & (evaluations.number > 2), torch.full_like(good, value), good)

    return image


def _samples(problem: Problem, rows: list[int]) -> Problem:
    """The problem for some samples of the batch."""
    index, batch = torch.tensor(rows), len(problem.z0)
    return dataclasses.replace(
        problem,
        z0=problem.z0[index],
        inputs=tuple(cut(x, AUTOMATIC, batch, index) for x in problem.inputs),
        solution=None if problem.solution is None else problem.solution[index],
    )


def _rows(solution: Solution, rows: list[int]) -> Solution:
    """What a solution says of some samples."""
    return dataclasses.replace(
        solution, value=solution.value[rows], status=solution.status[rows], num_steps=solution.num_steps[rows]
    )


def _check_residual(problem: Problem, found: Solution) -> None:
    residual, _ = problem.residuals(found.value)
    assert found.residual is not None
    rounding = 20 * torch.finfo(residual.dtype).eps * float(found.value.flatten(1).norm(dim=1).max())
    torch.testing.assert_close(
        found.residual,
        residual,
        rtol=1e-3,
        atol=rounding,
        msg=lambda text: f"{problem.name}: the residual reported should be that of the value: {text}",
    )


def _check_no_worse(problem: Problem, found: Solution) -> None:
    start = problem.residuals(problem.z0)[0]
    assert found.residual is not None
    # Where f(z) is large, a residual within the tolerance may be larger than that of the start.
    assert ((found.residual <= start * (1 + 1e-6)) | found.converged).all(), (
        f"{problem.name}: residuals {found.residual.tolist()} are worse than at the start, {start.tolist()}"
    )


def _attributes(solver: Solver) -> dict[str, Any]:
    """Settings, and whatever else lies on the object."""
    fields = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver)}  # type: ignore[arg-type]
    return {**getattr(solver, "__dict__", {}), **fields}


def _tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in a nest of dataclasses, tuples, lists and dicts."""
    if isinstance(state, Tensor):
        yield state
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from _tensors(getattr(state, field.name))
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, tuple | list):
        for value in state:
            yield from _tensors(value)


def _exact_gradients(problem: Problem, inputs: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, ...]:
    """Gradients of <weights, z*> from dense linear algebra."""
    assert problem.solution is not None
    z = problem.solution

    def flat(v: Tensor) -> Tensor:
        return problem.f(v.view_as(z)).flatten()

    jacobian: Tensor = torch.autograd.functional.jacobian(flat, z.flatten())  # type: ignore[no-untyped-call]
    eye = torch.eye(len(jacobian), dtype=jacobian.dtype)
    adjoint = torch.linalg.solve(eye - jacobian.T, weights.flatten()).view_as(z)
    return torch.autograd.grad(problem.cell(z, *inputs), inputs, adjoint)

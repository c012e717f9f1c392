# ruff: noqa: D102  # the name of a test says what it is about
"""What a solver keeps is in its state, and what it is given stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ...counting import CountedCell
from ...driver import iterate
from ...solution import Solution
from ...solvers import Solver
from ...solvers.base import Query, Seen
from ...stopping import Stopping
from ..problems import Problem
from .base import SOLVABLE, SolverLaws, both_dtypes, check_residual


class StateLaws(SolverLaws):
    """What a solver keeps is in its state, and what it is given stays as it is."""

    def test_the_state_lives_outside_of_the_solver(self) -> None:
        outer = SOLVABLE["tanh"](self.contraction, torch.float64)
        inner = SOLVABLE["linear"](self.contraction, torch.float64)

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
        problem = SOLVABLE["tanh"](self.contraction, torch.float64)
        with torch.no_grad():
            found = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps))
        for tensor in _tensors(found.state):
            assert tensor.shape[:1] == (len(problem.z0),), (
                f"tensors of the state should be (B, ...) with B = {len(problem.z0)}, "
                f"got shape {tuple(tensor.shape)} after {steps} steps"
            )

    @both_dtypes
    def test_a_step_keeps_shape_and_dtype(self, dtype: torch.dtype) -> None:
        problem = SOLVABLE["linear"](self.contraction, dtype)
        for steps in (1, 2, 5):
            with torch.no_grad():
                value = iterate(problem.f, problem.z0, self.solver, Stopping.steps(steps)).value
            assert value.shape == problem.z0.shape
            assert value.dtype == dtype, f"iterates should stay {dtype}, got {value.dtype}"

    @pytest.mark.parametrize("grad", [False, True], ids=["off the tape", "on the tape"])
    def test_neither_an_iterate_nor_an_image_is_written_to(self, grad: bool) -> None:
        problem = SOLVABLE["tanh"](self.contraction, torch.float64)
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
        problem = SOLVABLE["mixed"](self.contraction, torch.float64)
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
        problem = SOLVABLE["tanh"](self.contraction, torch.float64)
        f = CountedCell(problem.f)
        with torch.no_grad():
            plain = iterate(f, problem.z0, self.solver, Stopping.steps(steps))
            assert plain.nfe == f.evaluations == steps, (
                f"{steps} steps took {f.evaluations} evaluations, {plain.nfe} were reported"
            )
            measured = iterate(f, problem.z0, self.solver, Stopping.steps(steps, measure=True))
        assert measured.nfe == f.evaluations - steps == steps + 1
        assert torch.equal(measured.value, plain.value), "measuring the residual should not change the value"
        check_residual(problem, measured)


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

# ruff: noqa: D102  # the name of a test says what it is about
"""Gradients through the steps, and adjoints that the solver solves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ...backward import Backward, ImplicitDifferentiation, Unroll
from ...fixed_point import fixed_point
from ...stopping import Stopping
from ..problems import Problem
from .base import SOLVABLE, SolverLaws, normal


class GradientLaws(SolverLaws):
    """Gradients through the steps, and adjoints that the solver solves."""

    def test_gradients_through_the_steps_are_finite(self) -> None:
        problem = SOLVABLE["linear"](self.contraction, torch.float64)
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
        problem = SOLVABLE["tanh"](self.contraction, torch.float64)
        plain = self._solve(problem, rtol=1e-7)
        inputs = problem.requiring_grad().inputs
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
        problem = SOLVABLE[name](self.contraction, torch.float64)
        inputs = problem.requiring_grad().inputs
        weights = normal(*problem.z0.shape)
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

# ruff: noqa: D102  # the name of a test says what it is about
"""The layer: the default one solves the cell, and its gradient is right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ..._scope import entered
from ...backward import Unroll
from ...layer import ImplicitLayer
from ...stopping import Stopping
from .base import demand
from .map import MapLaws
from .trees import weighted_sum


class LayerLaws(MapLaws):
    """The default layer solves the cell, and its gradient is right."""

    def test_the_default_layer_solves_it(self) -> None:
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        if self.stopping is None:
            pytest.skip("`stopping` is None: not promised")
        demand(self._solve_fault())

    def test_the_gradient_of_the_layer_is_that_of_an_unrolled_solve(self) -> None:
        if self.stopping is None or not self.differentiable:
            pytest.skip("`stopping` is None or `differentiable` is False: not promised")
        self._require(self._output_fault, self._repetition_fault, self._writing_fault)
        self._require(self._gradient_fault, self._solve_fault)
        dtype = self._dtype()
        if dtype not in (torch.float32, torch.float64):
            pytest.skip(f"{dtype} is too coarse to compare gradients; add float32 to `dtypes`")
        tight = Stopping(rtol=2e-6 if dtype == torch.float32 else 1e-10, max_steps=400, patience=None)
        setup, gradients = self._setup(), []
        for backward in (None, Unroll()):
            _, inputs, tensors = self._recorded(setup, with_state=False)
            if not tensors:
                pytest.skip("the cell has neither trainable parameters nor inputs of floating-point dtype")
            layer = ImplicitLayer(setup.cell, stopping=tight, backward=backward, on_failure="ignore")
            with torch.enable_grad(), entered(setup.scope):
                solution = layer.solve(*inputs, z0=setup.z0)
                assert solution.converged.all(), (
                    f"the layer should reach rtol={tight.rtol:g} in {tight.max_steps} steps to compare "
                    f"gradients, got {solution}; if that is not promised set `stopping = None` on the test "
                    "class"
                )
                found: tuple[Tensor | None, ...] = (None,) * len(tensors)
                loss = weighted_sum(solution.value)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, tuple(tensors.values()), allow_unused=True)
            gradients.append(dict(zip(tensors, found, strict=True)))
        implicit, unrolled = gradients
        # A gradient that is zero comes out as rounding errors of the others.
        total = math.hypot(*(float(g.norm()) for g in unrolled.values() if g is not None))
        for name, expected in unrolled.items():
            gradient = implicit[name]
            assert gradient is not None, f"no gradient of the layer reaches {name}"
            assert expected is not None, f"no gradient through an unrolled solve reaches {name}"
            error = float((gradient - expected).norm()) / max(float(expected.norm()), 1e-3 * total, 1e-300)
            assert error <= self.gradient_rtol, (
                f"the gradient of {name} by implicit differentiation should be that through an unrolled "
                f"solve, relative difference {error:.1e}; look for what changes gradients on their way "
                "through the cell (hooks, custom backward passes), or raise `gradient_rtol` "
                f"(now {self.gradient_rtol:g}) on the test class"
            )

    def _solve_fault(self) -> str | None:
        """Whether the layer does not solve it."""
        setup = self._setup()
        layer = ImplicitLayer(setup.cell, stopping=self.stopping, on_failure="ignore")
        with torch.no_grad():
            found = layer.solve(*setup.inputs, z0=setup.z0)
        if found.converged.all():
            return None
        return (
            f"ImplicitLayer(cell) should solve it with {self.stopping}, got {found}; a smaller gain on z "
            "makes it easier, and deqlib.diagnose says more; or set another `stopping` on the test class "
            "(None: not promised)"
        )

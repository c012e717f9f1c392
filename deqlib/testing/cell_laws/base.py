"""What the laws of cells share: settings, and a cell with inputs and a point to evaluate it at."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ..._scope import Scope, entered
from ..._torch import tree_leaves, tree_map
from ...state import AUTOMATIC, cut
from ...stopping import Stopping
from .trees import clone_of, moved, rows_of


class CellLaws:
    """What laws share: the settings of a suite, see `CellConformance`, and what they evaluate."""

    cell: ClassVar[Any]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)
    batch: ClassVar[int] = 5
    axes: ClassVar[tuple[int | None, ...] | None] = None
    independent: ClassVar[bool] = True
    bitwise: ClassVar[bool] = True
    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float64: 1e-9,
        torch.float32: 1e-4,
        torch.float16: 2e-2,
        torch.bfloat16: 1e-1,
    }
    may_change: ClassVar[tuple[str, ...]] = ()
    contraction: ClassVar[float | None] = None
    differentiable: ClassVar[bool] = True
    stopping: ClassVar[Stopping | None] = Stopping()
    gradient_rtol: ClassVar[float] = 1e-3
    empty: ClassVar[bool] = False

    def make_inputs(
        self, batch: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Any, tuple[Any, ...]]:
        """Where a solve starts, and the further arguments of the cell.

        Args:
            batch: samples, the first axis of every tensor of the state.
            dtype: of the state.
            generator: on the CPU; draws from it, or from the default one, are the same every time.

        Returns:
            z0, a tensor or pytree of tensors (B, ...), and a tuple of inputs.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: write make_inputs(batch, dtype, generator), returning z0 and a tuple"
        )

    def _require(self, *faults: Callable[[], str | None]) -> None:
        """Skip the law where the cell breaks one that it rests on.

        Faults are looked for in this order: a later one can be told only where the earlier ones are not.
        """
        for find in faults:
            fault = find()
            if fault is not None:
                pytest.skip(f"rests on another law, which the cell breaks: {fault}")

    def _dtype(self) -> torch.dtype:
        """The widest."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).bits)

    def _tolerance(self) -> float:
        dtype = self._dtype()
        if dtype not in self.tolerances:
            raise ValueError(f"CellConformance: `tolerances` must have an entry for {dtype}")
        return self.tolerances[dtype]

    def _setup(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        batch: int | None = None,
        at_start: bool = False,
    ) -> Evaluation:
        """The cell, its inputs and a random point, the same for the same seed."""
        if self.batch < 2:
            raise ValueError(f"CellConformance: batch must be at least 2, got {self.batch}")
        dtype, batch = self._dtype() if dtype is None else dtype, self.batch if batch is None else batch
        generator = torch.Generator().manual_seed(seed)
        with same_draws(0):
            cell = self._converted(dtype)
        with same_draws(seed):
            z0, inputs = self.make_inputs(batch, dtype, generator)
        if not isinstance(inputs, tuple):
            raise TypeError(
                f"make_inputs: expected z0 and a tuple of inputs, got inputs of type {type(inputs).__name__}"
            )
        setup = Evaluation(cell, z0, z0, inputs, self.axes, batch, generator)
        if not at_start:
            setup.z = tree_map(lambda fz: moved(fz, 0.3, generator), setup.image())
        return setup

    def _converted(self, dtype: torch.dtype) -> Any:
        found = inspect.getattr_static(type(self), "cell", None)
        if found is None:
            raise TypeError(f"{type(self).__name__}: set `cell` to the cell under test")
        if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters), "") != "self":
            return found  # not bound to the test
        cell = self.cell
        if not isinstance(cell, nn.Module):
            return cell
        if not isinstance(found, property):
            cell = copy.deepcopy(cell)
        return cell.to(dtype)


@dataclass
class Evaluation:
    """A cell, where it is evaluated, and the solve that the evaluations belong to."""

    cell: Any
    z0: Any
    z: Any
    inputs: tuple[Any, ...]
    axes: tuple[int | None, ...] | None
    batch: int
    generator: torch.Generator
    scope: Scope = field(default_factory=Scope)

    def image(self, at: tuple[Any, tuple[Any, ...]] | None = None, *, copied: bool = True) -> Any:
        """The cell at the point, or at another with inputs of its own; on copies of both."""
        z, inputs = (self.z, self.inputs) if at is None else at
        return self._evaluate(z, inputs, self.scope, copied)

    def part(self, rows: Tensor) -> Any:
        """The cell at some samples, as the driver evaluates it when others have left the batch."""
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(self.inputs)
        inputs = tuple(cut(x, axis, self.batch, rows) for x, axis in zip(self.inputs, axes, strict=True))
        return self._evaluate(rows_of(self.z, rows), inputs, self.scope.take(rows, self.batch), True)

    def _evaluate(self, z: Any, inputs: tuple[Any, ...], scope: Scope, copied: bool) -> Any:
        if copied:
            z, inputs = tree_map(clone_of, z), tuple(tree_map(clone_of, x) for x in inputs)
        # A copy of a recorded tensor is on the tape: only `enable_grad` around this asks for gradients.
        recorded = torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((z, inputs))
        )
        with torch.set_grad_enabled(recorded), entered(scope):
            return self.cell(z, *inputs)


def demand(fault: str | None) -> None:
    """Fail where there is a fault, in its words."""
    assert fault is None, fault


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """The default generator of the CPU seeded; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""The module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._checks import check_instance
from .backward import Backward, ImplicitDifferentiation
from .fixed_point import Compact, check_setting, check_settings, outside_of_graphs, solve_for
from .reporting import FailurePolicy
from .solution import OnFailure, Solution
from .solvers import Auto, Solver
from .starting import starting_point
from .stopping import Stopping

_SETTINGS = ("solver", "stopping", "backward", "on_failure", "compact")
_OF_THE_CELL = ("has_aux", "with_step")
_OF_ONE_SOLVE = ("z0", *_SETTINGS, "state")


class ImplicitLayer(nn.Module):
    """A layer whose output is the fixed point z = cell(z, *inputs, **keywords).

    Nothing of a solve stays on the layer: two forward passes before one backward are independent. Settings
    are attributes of the same names; one that is assigned later holds from the next solve on.

    Args:
        cell: module or callable, `cell(z, *inputs, **keywords) -> z` of the same structure, shapes, dtypes
            and device. A module is registered, so its parameters train with the layer.
        solver: default `Auto()`: for every sample the plain iteration if that is fast, else Anderson, Broyden
            or Newton-Krylov.
        backward: default `ImplicitDifferentiation()`.
        stopping: default `Stopping()`: relative residual 1e-3 within 50 steps.
        on_failure: "raise", "warn" or "ignore", for the forward and for the adjoint solve, or a
            `FailurePolicy`.
        init: callable `init(*inputs, **keywords) -> z0`; default zeros shaped like the first input.
        compact: let finished samples leave the batch that the cell sees: `True`, or a tuple with the batch
            axis of every input; see `deqlib.fixed_point`.
        has_aux: the cell returns `(z, aux)`, and `solve(...).aux` has what it returned at the fixed point;
            see `deqlib.fixed_point`.
        with_step: the cell is called with a keyword `step` that says how many steps each sample has taken;
            see `deqlib.fixed_point` and `Step`.

    Raises:
        TypeError, ValueError: a setting of the wrong kind.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        *,
        solver: Solver | None = None,
        backward: Backward | None = None,
        stopping: Stopping | None = None,
        on_failure: OnFailure | FailurePolicy = "warn",
        init: Callable[..., Any] | None = None,
        compact: Compact = False,
        has_aux: bool = False,
        with_step: bool = False,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver = Auto() if solver is None else solver
        self.backward = ImplicitDifferentiation() if backward is None else backward
        self.stopping = Stopping() if stopping is None else stopping
        self.on_failure: OnFailure | FailurePolicy = on_failure
        self.init = init
        self.compact = compact
        self.has_aux, self.with_step = has_aux, with_step
        check_settings("ImplicitLayer", self.solver, self.stopping, self.backward, on_failure, compact)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is assigned is looked at now: a setting of the wrong kind would fail far from here, and one of
        # the wrong name not at all.
        if name in _SETTINGS:
            check_setting("ImplicitLayer", name, value)
        elif name == "cell" and not callable(value):
            raise TypeError(f"ImplicitLayer: cell must be callable, got {type(value).__name__}")
        elif name == "init" and not (value is None or callable(value)):
            raise TypeError(f"ImplicitLayer: init must be callable or None, got {type(value).__name__}")
        elif name in _OF_THE_CELL:
            check_instance("ImplicitLayer", bool, "True or False", **{name: value})
        elif name == "backward_mode":
            raise AttributeError(
                "ImplicitLayer: backward_mode is called backward; assign layer.backward = ..."
            )
        super().__setattr__(name, value)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The fixed point, structure of the starting point, carrying gradient.

        Args:
            *inputs: of the cell, after the state; anything, passed as they are.
            **keywords: of the cell, by name, likewise.

        Raises:
            TypeError: a keyword that is a setting of `solve`; else see there.
        """
        for name in _OF_ONE_SOLVE:
            if name in keywords:
                raise TypeError(
                    f"ImplicitLayer: {name} is a setting of one solve, got layer(..., {name}=...): call "
                    f"layer.solve(..., {name}=...).value; an input of the cell must have another name"
                )
        return self.solve(*inputs, **keywords).value

    def solve(
        self,
        *inputs: Any,
        z0: Any = None,
        solver: Solver | None = None,
        stopping: Stopping | None = None,
        backward: Backward | None = None,
        on_failure: OnFailure | FailurePolicy | None = None,
        compact: Compact | None = None,
        state: Any = None,
        **keywords: Any,
    ) -> Solution:
        """The same solve with all that is known about it.

        Args:
            *inputs: of the cell, after the state; anything, passed as they are.
            z0: starting point of this call; default `init(*inputs, **keywords)`.
            solver: of this call; default the layer's.
            stopping: of this call; default the layer's.
            backward: of this call; default the layer's.
            on_failure: of this call, and of its backward pass; default the layer's.
            compact: of this call; default the layer's.
            state: `Solution.state` of an earlier call on inputs like these, to go on with what that
                learnt; pass its `value` as `z0`.
            **keywords: of the cell, by name; anything, passed as they are. A cell whose own keyword has the
                name of a setting here gets it by position, or in a function around it.

        Raises:
            TypeError, ValueError, NonConvergenceError: see `deqlib.fixed_point`.
            ValueError: the cell, or a module in it, is sharded by FSDP by itself: it would gather its
                parameters at every evaluation, and processes evaluate it a different number of times.
        """
        run = outside_of_graphs(
            self.stopping if stopping is None else stopping,
            self.backward if backward is None else backward,
        )
        if run is not None:
            settings: dict[str, Any] = {"solver": solver, "stopping": stopping, "backward": backward}
            settings |= {"z0": z0, "on_failure": on_failure, "compact": compact, "state": state}
            found: Solution = run(self.solve, *inputs, **settings, **keywords)
            return found
        refuse_sharded(self.cell)
        if z0 is None:
            z0 = starting_point(self.init, inputs, keywords)
        return solve_for(
            self,
            self.cell,
            z0,
            inputs,
            keywords,
            solver=self.solver if solver is None else solver,
            stopping=self.stopping if stopping is None else stopping,
            backward=self.backward if backward is None else backward,
            on_failure=self.on_failure if on_failure is None else on_failure,
            compact=self.compact if compact is None else compact,
            state=state,
            has_aux=self.has_aux,
            with_step=self.with_step,
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`: of each what differs from its defaults."""
        text = f"solver={self.solver}, backward={self.backward}, stopping={self.stopping}"
        if self.on_failure != "warn":
            text += f", on_failure={self.on_failure!r}"
        for name in ("compact", *_OF_THE_CELL):
            if getattr(self, name) is not False:
                text += f", {name}={getattr(self, name)}"
        return text


def refuse_sharded(cell: Callable[..., Any]) -> None:
    """Raise `ValueError` where a module in the cell gathers its parameters by itself.

    FSDP gathers in the hooks of the module it was applied to. In a cell that is at every evaluation and,
    unless told otherwise, at every product of the adjoint with J^T: processes that take different numbers
    of them wait for one another for ever. No setting of such a module avoids that and saves memory too.

    Looked up at every solve, since a model is sharded after it was built. Where FSDP was never imported
    this is one look into a dictionary, and it must not be imported for this.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(cell, nn.Module) or not torch.distributed.is_initialized():
        return
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for name, module in cell.named_modules():
        if isinstance(module, kinds):
            where = f"cell.{name}" if name else "cell"
            raise ValueError(
                f"ImplicitLayer: the cell must not be sharded by itself, got FSDP on {where} "
                f"({type(module).__name__}): it would gather its parameters at every evaluation, and "
                "processes that take different numbers of evaluations would wait for one another for ever; "
                "call fully_shard on the ImplicitLayer, or on a block that holds it, and on nothing inside it"
            )

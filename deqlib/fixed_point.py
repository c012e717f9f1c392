"""The functional entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ._checks import check_instance
from .backward import Backward, ImplicitDifferentiation
from .backward.capture import is_transformed
from .driver import iterate
from .solution import OnFailure, Solution, check_on_failure, report_failure
from .solvers import Auto, Solver
from .state import FlatMap, Map, flatten
from .stopping import Stopping

Compact = bool | tuple[int | None, ...]


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] = (),
    *,
    solver: Solver | None = None,
    stopping: Stopping | None = None,
    backward: Backward | None = None,
    on_failure: OnFailure = "warn",
    compact: Compact = False,
    state: Any = None,
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch.

    Args:
        f: `f(z, *args) -> z`, same structure, shapes, dtypes and device as `z0`. Samples must not depend
            on one another. Gradients reach everything f uses: `args`, parameters, captured tensors.
        z0: starting point, a floating-point tensor or pytree of tensors whose first axis is the batch.
        args: further arguments of `f`, passed as they are.
        solver: default `Auto()`: for every sample the plain iteration if that is fast, else Anderson, Broyden
            or Newton-Krylov.
        stopping: default `Stopping()`: relative residual 1e-3 within 50 steps.
        backward: default `ImplicitDifferentiation()`.
        on_failure: "raise" throws `NonConvergenceError`, "warn" warns `NonConvergenceWarning`, "ignore"
            does neither; for the forward and for the adjoint solve.
        compact: let finished samples leave the batch that `f` sees, so that an easy sample does not pay
            for a hard one. `True` cuts every tensor in `args` whose first axis is as long as the batch,
            and passes everything else as it is; a tuple says it for each argument: the axis of the batch
            of the tensors in it, or `None` for an argument that samples share. What `f` captures cannot
            be cut: pass it in `args`. The adjoint solve always sees the whole batch, and so do solves
            under `torch.func` transforms and forward-mode differentiation.
        state: `Solution.state` of an earlier solve of the same shape and solver, to go on with what that
            learnt; pass its `value` as `z0`. For when f changed a little since. Not under `torch.func`
            transforms, where `Solution.state` is `None`.

    Returns:
        `Solution`, whose `value` has the structure of `z0` and carries gradient.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, or an `f` that changes the structure, shape,
            dtype or device of the state.
        NonConvergenceError: see `on_failure`.
    """
    solver = Auto() if solver is None else solver
    stopping = Stopping() if stopping is None else stopping
    backward = ImplicitDifferentiation() if backward is None else backward
    check_settings("fixed_point", solver, stopping, backward, on_failure, compact)
    if not isinstance(args, tuple):
        raise TypeError(f"fixed_point: args must be a tuple, got {type(args).__name__}")
    if isinstance(compact, tuple) and len(compact) != len(args):
        raise ValueError(
            f"compact: expected one axis (or None) for each of {len(args)} inputs, got {compact}"
        )
    if torch.compiler.is_compiling() and not (
        stopping.is_fixed and (backward.is_traceable or not torch.is_grad_enabled())
    ):
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export: a solve to a tolerance depends on the data, and an implicit backward pass "
                "cannot be exported; use stopping=Stopping.steps(n) and export under torch.no_grad()"
            )
        from ._eager import solve_eagerly  # not before it is needed, see there

        eager: Solution = solve_eagerly(
            f,
            z0,
            args,
            solver=solver,
            stopping=stopping,
            backward=backward,
            on_failure=on_failure,
            compact=compact,
            state=state,
        )
        return eager
    if state is not None and is_transformed():
        raise ValueError(
            "state: a solve under torch.func transforms or forward-mode differentiation begins afresh; leave "
            "it out there"
        )
    outer_solver, outer_stopping = solver, stopping
    flat_f, flat_z0 = flatten(f, z0, args)
    layout = flat_f.layout
    if isinstance(compact, tuple):
        flat_f = replace(flat_f, axes=compact)

    def solve(
        f: Map,
        z0: Tensor,
        *,
        solver: Solver | None = None,
        stopping: Stopping | None = None,
        what: str = "fixed-point solve",
    ) -> Solution:
        rule = stopping or outer_stopping
        axes = rule.norm_axes
        forward = isinstance(f, FlatMap)  # not the map of an adjoint
        solution = iterate(
            f,
            z0,
            solver or outer_solver,
            rule,
            state=state if forward else None,
            unit_norms=None if axes is None else lambda z: layout.norms(z, axes),
            compact=f if isinstance(f, FlatMap) and compact is not False else None,
        )
        if not rule.is_fixed:
            # Under `vmap` one solve holds the samples of many batches.
            whole = layout.of_batch(solution.value.shape[0])
            report_failure(replace(solution, value=whole.unravel(solution.value)), on_failure, what)
        return solution

    solution = backward.apply(flat_f, flat_z0, solve)
    value = layout.unravel(solution.value)
    if solution.value.requires_grad:
        # A copy and no view: the caller may write to it, and the backward pass needs it as it was.
        value = tree_map(torch.clone, value)
    return replace(solution, value=value)


def check_settings(
    owner: str, solver: Solver, stopping: Stopping, backward: Backward, on_failure: str, compact: Compact
) -> None:
    """Raise unless every setting of a solve is of its kind."""
    check_instance(owner, Solver, "a solver such as deqlib.Anderson(memory=5)", solver=solver)
    check_instance(owner, Stopping, "a deqlib.Stopping such as Stopping(rtol=1e-3)", stopping=stopping)
    check_instance(
        owner, Backward, "a backward mode such as deqlib.ImplicitDifferentiation()", backward=backward
    )
    check_on_failure(owner, on_failure)
    backward.check(solver, stopping)
    axes = compact if isinstance(compact, tuple) else ()
    if not (isinstance(compact, bool) or (isinstance(compact, tuple) and all(map(_is_axis, axes)))):
        raise TypeError(
            f"{owner}: compact must be True, False, or a tuple with the batch axis of every input "
            f"(None for one that samples share), got {compact!r}"
        )
    if compact is not False and stopping.is_fixed:
        raise ValueError(
            f"{owner}: compact has no effect with a fixed number of steps, where no sample finishes early"
        )


def _is_axis(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))

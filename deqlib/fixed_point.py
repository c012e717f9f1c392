"""The functional entry point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._checks import check_instance
from ._torch import is_transformed, tree_map
from .backward import Backward, ImplicitDifferentiation
from .confirmation import Claim, Confirm
from .driver import approach, iterate
from .progress import UnitNorms
from .solution import OnFailure, Solution, check_on_failure, report_failure
from .solvers import Auto, Solver
from .state import FlatMap, Layout, Map, flatten
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
            on one another: where they turn out to, they are `Status.COUPLED`. Gradients reach everything f
            uses: `args`, parameters, captured tensors.
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
            and passes everything else as it is; a guess that changes what `f` gives is an error. A tuple
            says it for each argument: the axis of the batch of the tensors in it, or `None` for an argument
            that samples share. What `f` captures cannot be cut: pass it in `args`. The whole batch has the
            last word, which is one evaluation where autograd does not record. The adjoint solve always sees
            the whole batch, and so do solves under `torch.func` transforms and forward-mode differentiation.
        state: `Solution.state` of an earlier solve of the same shape and solver, to go on with what that
            learnt; pass its `value` as `z0`. For when f changed a little since. Not under `torch.func`
            transforms, where `Solution.state` is `None`.

    Returns:
        `Solution`, whose `value` has the structure of `z0` and carries gradient.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, an `f` that changes the structure, shape,
            dtype or device of the state, or a `compact` that does not fit the inputs.
        NonConvergenceError: see `on_failure`.
    """
    solver = Auto() if solver is None else solver
    stopping = Stopping() if stopping is None else stopping
    backward = ImplicitDifferentiation() if backward is None else backward
    check_settings("fixed_point", solver, stopping, backward, on_failure, compact)
    axes = compact if isinstance(compact, tuple) else None
    if not isinstance(args, tuple):
        raise TypeError(f"fixed_point: args must be a tuple, got {type(args).__name__}")
    if axes is not None and len(axes) != len(args):
        raise ValueError(
            f"compact: expected one axis (or None) for each of {len(args)} inputs, got {compact}"
        )
    if torch.compiler.is_compiling() and not _is_traceable(stopping, backward):
        from ._eager import solve_eagerly  # not before it is needed, see there

        settings: dict[str, Any] = {"solver": solver, "stopping": stopping, "backward": backward}
        settings |= {"on_failure": on_failure, "compact": compact, "state": state}
        eager: Solution = solve_eagerly(fixed_point, f, z0, args, **settings)
        return eager
    if state is not None and is_transformed():
        raise ValueError(
            "state: a solve under torch.func transforms or forward-mode differentiation begins afresh; leave "
            "it out there"
        )
    flat_f, flat_z0 = flatten(f, z0, args, axes)
    solve = _Solve(solver, stopping, on_failure, flat_f.layout, compact is not False, state)
    solution = backward.apply(flat_f, flat_z0, solve)
    value = flat_f.layout.unravel(solution.value)
    if solution.value.requires_grad:
        # A copy and no view: the caller may write to it, and the backward pass needs it as it was.
        value = tree_map(torch.clone, value)
    return replace(solution, value=value)


@dataclass(frozen=True, eq=False)  # as `deqlib.state.FlatMap`
class _Solve:
    """The driver with a caller's settings; see `deqlib.backward.base.Solve`."""

    solver: Solver
    stopping: Stopping
    on_failure: OnFailure
    layout: Layout
    compact: bool
    state: Any

    def __call__(self, f: Map, z0: Tensor, *, stopping: Stopping | None = None) -> Solution:
        """The fixed point."""
        return self._reported(self._claim(f, z0, stopping).settled(), "fixed-point solve")

    def unconfirmed(self, f: Map, z0: Tensor) -> tuple[Solution, Confirm]:
        """The fixed point, and what settles it by its image."""
        claim = self._claim(f, z0, None)
        if claim.is_open:
            return claim.solution, lambda image: self._reported(claim.decided(image), "fixed-point solve")
        solution = self._reported(claim.solution, "fixed-point solve")
        return solution, lambda image: solution

    def linear(
        self, f: Map, start: Tensor, *, solver: Solver, stopping: Stopping, name: str = "adjoint solve"
    ) -> Solution:
        """A linear problem of a derivative."""
        return self._reported(
            iterate(f, start, solver, stopping, unit_norms=self._unit_norms(stopping)), name
        )

    def _claim(self, f: Map, z0: Tensor, stopping: Stopping | None) -> Claim:
        # Under a transform, and in a mode that wraps it, f is no map that can be cut.
        cut = f if self.compact and isinstance(f, FlatMap) else None
        rule = self.stopping if stopping is None else stopping
        norms = self._unit_norms(rule)
        return approach(f, z0, self.solver, rule, state=self.state, unit_norms=norms, compact=cut)

    def _unit_norms(self, stopping: Stopping) -> UnitNorms | None:
        layout, axes = self.layout, stopping.norm_axes
        return None if axes is None else lambda z: layout.norms(z, axes)

    def _reported(self, solution: Solution, name: str) -> Solution:
        """The solution, once its failures are told."""
        if solution.residual is not None:  # else the number of steps was fixed
            # Under `vmap` one solve holds the samples of many batches.
            whole = self.layout.of_batch(solution.value.shape[0])
            report_failure(replace(solution, value=whole.unravel(solution.value)), self.on_failure, name)
        return solution


def _is_traceable(stopping: Stopping, backward: Backward) -> bool:
    """Whether a compiler may look into the solve.

    Raises:
        RuntimeError: it may not, but is to export it whole.
    """
    if stopping.is_fixed and (backward.is_traceable or not torch.is_grad_enabled()):
        return True
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export: a solve to a tolerance depends on the data, and an implicit backward pass "
            "cannot be exported; use stopping=Stopping.steps(n) and export under torch.no_grad()"
        )
    return False


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

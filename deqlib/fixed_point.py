"""The functional entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._autocast import coarsest_dtype
from ._checks import check_callable, check_instance, check_keywords, plain
from ._compiler import run_eagerly
from ._torch import compiler_in_force, is_exporting, is_transformed, tree_leaves, tree_map, tree_unflatten
from .backward import Backward, ImplicitDifferentiation
from .confirmation import Claim, Confirm
from .driver import approach, iterate
from .naming import Caller
from .progress import UnitNorms
from .recording import is_recording, note
from .reporting import FORWARD, Attempt, FailurePolicy, check_on_failure, report_failure
from .solution import NonConvergenceError, OnFailure, Solution
from .solvers import Auto, Picard, Solver
from .state import FlatMap, Layout, Map, flatten
from .steps import Course
from .stopping import Stopping

Compact = bool | tuple[int | None, ...]

# Made once: the compiler of PyTorch 2.11 fails where it traces how the last one is made.
_SOLVER, _STOPPING, _BACKWARD = Auto(), Stopping(), ImplicitDifferentiation()


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    solver: Solver | None = None,
    stopping: Stopping | None = None,
    backward: Backward | None = None,
    on_failure: OnFailure | FailurePolicy = "warn",
    compact: Compact = False,
    state: Any = None,
    has_aux: bool = False,
    with_step: bool = False,
) -> Solution:
    """Solve z = f(z, *args, **kwargs) for every sample of a batch.

    Args:
        f: `f(z, *args, **kwargs) -> z`, same structure, shapes, dtypes and device as `z0`. Samples must
            not depend on one another: where they turn out to, they are `Status.COUPLED`. Gradients reach
            everything f uses: arguments, parameters, captured tensors.
        z0: starting point, a floating-point tensor or pytree of tensors whose first axis is the batch.
        args: further arguments of `f`, passed as they are.
        kwargs: further arguments of `f` by name, passed as they are.
        solver: default `Auto()`: for every sample the plain iteration if that is fast, else Anderson, Broyden
            or Newton-Krylov.
        stopping: default `Stopping()`: relative residual 1e-3 within 50 steps.
        backward: default `ImplicitDifferentiation()`.
        on_failure: "raise" throws `NonConvergenceError`, "warn" warns `NonConvergenceWarning`, "ignore"
            does neither; for the forward and for the adjoint solve. A `FailurePolicy` lets a share of the
            samples fail without either.
        compact: let finished samples leave the batch that `f` sees, so that an easy sample does not pay
            for a hard one. `True` cuts every tensor in `args` and `kwargs` whose first axis is as long as
            the batch, and passes everything else as it is; a guess that changes what `f` gives is an error.
            A tuple says it for each argument in `args`: the axis of the batch of the tensors in it, or
            `None` for an argument that samples share. What `f` captures cannot be cut: pass it in `args`.
            The whole batch has the last word, which is one evaluation where autograd does not record. The
            adjoint solve always sees the whole batch, and so do solves under `torch.func` transforms and
            forward-mode differentiation.
        state: `Solution.state` of an earlier solve of the same shape and solver, to go on with what that
            learnt; pass its `value` as `z0`. For when f changed a little since. Not under `torch.func`
            transforms, where `Solution.state` is `None`.
        has_aux: `f` returns a tuple `(z, aux)`, aux whatever else it has to tell: losses, keys and values.
            `Solution.aux` is that of an evaluation at the value that is returned, and carries gradient as
            that does. It is one more evaluation, unless autograd does not record and the last one of the
            solve was at the value. Default `False`.
        with_step: `f` is called with a keyword `step`, a `Step` that says how many steps each sample has
            taken, and of how many. Such an f may be another map at every step and have no one fixed point, so
            the solver must be `Picard()`, and where gradients are recorded the backward mode `Unroll`,
            `StochasticJFB` or `JFB`, which differentiates the map of the step after the last. A tolerance is
            met where f at a sample's own step changes it little. Not under `torch.vmap`. Default `False`.

    Returns:
        `Solution`, whose `value` has the structure of `z0` and carries gradient.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, an `f` that changes the structure, shape,
            dtype or device of the state, or a `compact` that does not fit the inputs.
        NonConvergenceError: see `on_failure`.
    """
    solver = _SOLVER if solver is None else solver
    stopping = _STOPPING if stopping is None else stopping
    backward = _BACKWARD if backward is None else backward
    return solve_for(
        None,
        f,
        z0,
        args,
        {} if kwargs is None else kwargs,
        solver=solver,
        stopping=stopping,
        backward=backward,
        on_failure=on_failure,
        compact=compact,
        state=state,
        has_aux=has_aux,
        with_step=with_step,
    )


def solve_for(
    layer: nn.Module | None,
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    solver: Solver,
    stopping: Stopping,
    backward: Backward,
    on_failure: OnFailure | FailurePolicy,
    compact: Compact,
    state: Any,
    has_aux: bool,
    with_step: bool,
) -> Solution:
    """`fixed_point` for a layer, whose name messages and records have; `None`: of a cell by itself.

    Raises:
        TypeError, ValueError, NonConvergenceError: see `fixed_point`.
    """
    settings: dict[str, Any] = {"solver": solver, "stopping": stopping, "backward": backward}
    settings |= {"on_failure": on_failure, "compact": compact}
    owner = "fixed_point" if layer is None else "ImplicitLayer"
    check_callable(owner, **{"f" if layer is None else "cell": f})
    check_settings(owner, **settings)
    check_instance(owner, bool, "True or False", has_aux=has_aux, with_step=with_step)
    axes = _axes(compact, args, kwargs)
    if with_step:
        _check_changing(owner, solver, backward, kwargs)
    run = outside_of_graphs(stopping, backward)
    if run is not None:
        settings |= {"state": state, "has_aux": has_aux, "with_step": with_step}
        found: Solution = run(solve_for, layer, f, z0, args, kwargs, **settings)
        return found
    transformed = is_transformed()
    if state is not None and transformed:
        raise ValueError(
            "state: a solve under torch.func transforms or forward-mode differentiation begins afresh; leave "
            "it out there"
        )
    flat_f, flat_z0 = flatten(f, z0, args, axes, kwargs, has_aux=has_aux, with_step=with_step)
    layout = flat_f.layout
    caller = dtype = None
    if not torch.compiler.is_compiling():
        caller, dtype = Caller.now(f, layer), coarsest_dtype(layout.dtypes, layout.device.type)
    compacts = compact is not False
    solve = _Solve(
        solver, stopping, backward, on_failure, flat_f, compacts, state, caller, dtype, transformed
    )
    solution = backward.apply(flat_f, flat_z0, solve)
    if has_aux:
        solution = _with_aux(flat_f, solution, stopping)
    shaped = in_shape(solution, layout, stopping)
    if solution.value.requires_grad:
        # A copy and no view: the caller may write to it, and the backward pass needs it as it was.
        shaped = replace(shaped, value=tree_map(torch.clone, shaped.value))
    solution = shaped
    if caller is not None and not transformed and is_recording():
        note(caller.label, "forward", solution)
    return solution


def in_shape(solution: Solution, layout: Layout, stopping: Stopping) -> Solution:
    """The same solution, what is flat in it in the structure of the starting point."""
    place_steps = solution.place_steps
    if place_steps is not None:
        assert stopping.norm_axes is not None
        place_steps = tree_unflatten(layout.by_place(place_steps, stopping.norm_axes), layout.spec)
    return replace(solution, value=layout.unravel(solution.value), place_steps=place_steps)


def _check_changing(owner: str, solver: Solver, backward: Backward, kwargs: Any) -> None:
    """Raise unless the settings suit a cell that is told its step, and so may be another map at every step.

    Raises:
        TypeError: the cell has an input of the same name.
        ValueError: the solver or the backward mode takes the map for one.
    """
    if "step" in kwargs:
        raise TypeError(
            f"{owner}: with_step=True gives the cell its step by the name step, got an input of that name; "
            "call the input something else, or leave with_step out"
        )
    if not isinstance(solver, Picard):
        raise ValueError(
            f"{owner}: a cell of with_step=True may be another map at every step, and this solver learns "
            f"from earlier steps as if it were one, got solver={solver}; use solver=Picard()"
        )
    if (torch.is_grad_enabled() or is_transformed()) and not backward.may_change_by_step:
        raise ValueError(
            f"{owner}: a cell of with_step=True may be another map at every step and has then no one fixed "
            f"point to differentiate, got backward={backward}; use Unroll(), StochasticJFB() or JFB(), or "
            "solve under torch.no_grad()"
        )


def _with_aux(f: FlatMap, solution: Solution, stopping: Stopping) -> Solution:
    """The solution, and what the cell returns beside the state at its value."""
    value, last = solution.value, f.last
    assert last is not None
    is_constant = not (torch.is_grad_enabled() or is_transformed())
    if is_constant and last.point is not None and _is_same(last.point, value, may_wait=not stopping.is_fixed):
        return replace(solution, aux=last.aux)
    aux = f.with_aux(value)[1]
    return replace(solution, aux=aux, nfe=solution.nfe + 1, sample_nfe=solution.sample_nfe + 1)


def _is_same(point: Tensor, value: Tensor, *, may_wait: bool) -> bool:
    """Whether the host knows that two states are equal, by waiting for a device if it may."""
    return point is value or (may_wait and torch.equal(point, value))


def _axes(compact: Compact, args: Any, kwargs: Any) -> tuple[int | None, ...] | None:
    """The batch axis of every positional input, if the caller says it.

    Raises:
        TypeError, ValueError: inputs that are none, or axes that are not those of the inputs.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"fixed_point: args must be a tuple, got {type(args).__name__}")
    check_keywords("fixed_point", kwargs)
    if not isinstance(compact, tuple):
        return None
    if len(compact) != len(args):
        raise ValueError(
            f"compact: expected one axis (or None) for each of {len(args)} inputs, got {compact}"
        )
    held = [
        name for name, value in kwargs.items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    ]
    if held:
        raise ValueError(
            f"compact: a tuple says the batch axis of positional inputs alone, got {compact} and tensors in "
            f"the keyword inputs {', '.join(held)}; pass these by position and give each an axis or None, or "
            "take compact=True"
        )
    return tuple(map(plain, compact))


@dataclass(frozen=True, eq=False)  # as `deqlib.state.FlatMap`
class _Solve:
    """The driver with a caller's settings; see `deqlib.backward.base.Solve`."""

    solver: Solver
    stopping: Stopping
    backward: Backward
    on_failure: OnFailure | FailurePolicy
    whole: FlatMap  # the map of the whole batch
    compact: bool
    state: Any
    caller: Caller | None  # `None`: a compiler traces it, and there is nobody to tell anything
    dtype: torch.dtype | None  # the coarsest that the cell computes in; `None` likewise
    transformed: bool

    def __call__(
        self, f: Map, z0: Tensor, *, stopping: Stopping | None = None, course: Course | None = None
    ) -> Solution:
        """The fixed point."""
        claim = self._claim(f, z0, stopping if course is None else Stopping.steps(course.most), course)
        return self._told(claim.settled(), z0, self.solver, claim.rule, FORWARD)

    def unconfirmed(self, f: Map, z0: Tensor) -> tuple[Solution, Confirm]:
        """The fixed point, and what settles it by its image."""
        claim = self._claim(f, z0)

        def told(solution: Solution) -> Solution:
            return self._told(solution, z0, self.solver, claim.rule, FORWARD)

        if claim.is_open:
            return claim.solution, lambda image: told(claim.decided(image))
        solution = told(claim.solution)
        return solution, lambda image: solution

    def linear(
        self, f: Map, start: Tensor, *, solver: Solver, stopping: Stopping, name: str = "adjoint solve"
    ) -> Solution:
        """A linear problem of a derivative."""
        _refuse_meta(start, stopping, name)
        solution = iterate(f, start, solver, stopping, unit_norms=self._unit_norms(stopping))
        return self._told(solution, start, solver, stopping, name)

    def _claim(
        self, f: Map, z0: Tensor, stopping: Stopping | None = None, course: Course | None = None
    ) -> Claim:
        # Under a transform, and in a mode that wraps it, f is no map that can be cut.
        cut = f if self.compact and isinstance(f, FlatMap) else None
        rule = self.stopping if stopping is None else stopping
        _refuse_meta(z0, rule, FORWARD)
        norms = self._unit_norms(rule)
        how: dict[str, Any] = {"unit_norms": norms, "layout": self.whole.layout, "compact": cut}
        how |= {"course": course, "clock": self.whole.clock}
        return approach(f, z0, self.solver, rule, state=self.state, **how)

    def _unit_norms(self, stopping: Stopping) -> UnitNorms | None:
        layout, axes = self.whole.layout, stopping.norm_axes
        return None if axes is None else lambda z: layout.norms(z, axes)

    def _told(
        self, solution: Solution, start: Tensor, solver: Solver, stopping: Stopping, name: str
    ) -> Solution:
        """The solution, once it is recorded and its failures are reported."""
        if self.caller is not None:
            assert self.dtype is not None
            mode = type(self.backward).__name__
            self._tell(Attempt(self.caller, name, solver, stopping, mode, self.dtype), solution, start)
        return solution

    def _tell(self, attempt: Attempt, solution: Solution, z0: Tensor) -> None:
        """Record the solve, if that is wanted, and report samples that failed."""
        records = is_recording()
        # A forward solve is recorded when it is whole, with the evaluations for its derivative. Under a
        # transform it is that here alone: later there are stand-ins for what was found.
        later = attempt.kind == "forward" and not self.transformed
        if records and not later:
            self._note(attempt, solution)
        if attempt.stopping.is_fixed:
            return
        try:
            report_failure(attempt, solution, self.on_failure, z0, self._shaped)
        except NonConvergenceError:
            if records and later:
                self._note(attempt, solution)
            raise

    def _note(self, attempt: Attempt, solution: Solution) -> None:
        note(attempt.caller.label, attempt.kind, self._shaped(solution))

    def _shaped(self, solution: Solution) -> Solution:
        # Under `vmap` one solve holds the samples of many batches.
        return in_shape(solution, self.whole.layout.of_batch(len(solution.value)), self.stopping)


def _refuse_meta(z0: Tensor, stopping: Stopping, name: str) -> None:
    if z0.device.type == "meta" and not stopping.is_fixed:
        raise ValueError(
            f"{name}: a state on the meta device has no numbers to compare with a tolerance, got rtol="
            f"{stopping.rtol}; take a fixed number of steps, Stopping.steps(n), under torch.no_grad() or "
            "with backward=JFB()"
        )


def outside_of_graphs(stopping: Stopping, backward: Backward) -> Callable[..., Any] | None:
    """What is to run the solve where a compiler may not look into it; else `None`.

    What is no setting at all is refused by who runs.
    """
    if not torch.compiler.is_compiling():
        # Here the compiler left the function that asks alone, and would go through what it calls one by one.
        return run_eagerly if compiler_in_force() is not None else None
    are_settings = isinstance(stopping, Stopping) and isinstance(backward, Backward)
    if are_settings and _is_traceable(stopping, backward):
        return None
    # Not before they are needed, see there.
    from ._eager import break_graph, break_graph_of_transform, give_up_transform

    found: Callable[..., Any] = break_graph_of_transform if give_up_transform() else break_graph
    return found


def _is_traceable(stopping: Stopping, backward: Backward) -> bool:
    """Whether a compiler may look into the solve.

    Raises:
        RuntimeError: it may not, but is to export it whole.
    """
    if stopping.is_fixed:
        if is_transformed():
            traceable = backward.is_traceable_in_transforms
        else:
            traceable = backward.is_traceable or not torch.is_grad_enabled()
        if traceable:
            return True
    if is_exporting():
        raise RuntimeError(
            "torch.export: a solve to a tolerance depends on the data, and an implicit backward pass "
            "cannot be exported; use stopping=Stopping.steps(n) and export under torch.no_grad()"
        )
    return False


def check_settings(
    owner: str,
    solver: Solver,
    stopping: Stopping,
    backward: Backward,
    on_failure: OnFailure | FailurePolicy,
    compact: Compact,
) -> None:
    """Raise unless every setting of a solve is of its kind, and they go together."""
    given: dict[str, object] = {"solver": solver, "stopping": stopping, "backward": backward}
    given |= {"on_failure": on_failure, "compact": compact}
    for name, value in given.items():
        check_setting(owner, name, value)
    backward.check(solver, stopping)
    if compact is not False and stopping.is_fixed:
        raise ValueError(
            f"{owner}: compact has no effect with a fixed number of steps, where no sample finishes early"
        )


def check_setting(owner: str, name: str, value: Any) -> None:
    """Raise unless one setting of a solve is of its kind."""
    if name == "on_failure":
        check_on_failure(owner, value)
    elif name == "compact":
        axes = value if isinstance(value, tuple) else ()
        if not (
            isinstance(value, bool)
            or (isinstance(value, tuple) and all(_is_axis(plain(axis)) for axis in axes))
        ):
            raise TypeError(
                f"{owner}: compact must be True, False, or a tuple with the batch axis of every input "
                f"(None for one that samples share), got {value!r}"
            )
    else:
        kind, hint = _KINDS[name]
        check_instance(owner, kind, hint, **{name: value})


_KINDS: dict[str, tuple[type, str]] = {
    "solver": (Solver, "a solver such as deqlib.Anderson(memory=5)"),
    "stopping": (Stopping, "a deqlib.Stopping such as Stopping(rtol=1e-3)"),
    "backward": (Backward, "a backward mode such as deqlib.ImplicitDifferentiation()"),
}


def _is_axis(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))

"""What is said, and done, where a solve fails.

A message tells which layer it was, in which pass, how many samples, how far they got, and what can be
changed of what is in use. Two that differ in their numbers alone are one to Python's filters of warnings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ._checks import check_choice, check_number, settle_numbers
from .naming import Caller
from .solution import (
    NonConvergenceError,
    NonConvergenceWarning,
    OnFailure,
    Solution,
    Status,
    levels_to_caller,
)
from .solvers import Auto, Solver
from .stopping import Stopping

FORWARD = "fixed-point solve"  # name of the solve that is not of a derivative
_CONTRACT = "make the cell contract more (scale its weights down)"
_FLOOR = 4  # a residual of so many times a type's resolution may be all that the type can reach


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """What becomes of a solve in which samples fail, where a few of them may.

    Args:
        action: "raise" throws `NonConvergenceError`, "warn" warns `NonConvergenceWarning`, "ignore" does
            neither.
        tolerated: share of the samples of a batch, in [0, 1), that may fail without either; of a forward and
            of an adjoint solve each. Where more fail, the message tells of all.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    action: OnFailure = "warn"
    tolerated: float = 0.0

    def __post_init__(self) -> None:
        """Validate."""
        settle_numbers(self)
        check_choice("FailurePolicy", get_args(OnFailure), action=self.action)
        check_number("FailurePolicy", 0, 1, tolerated=self.tolerated)
        if self.tolerated == 1:
            raise ValueError(
                'FailurePolicy: tolerated must be below 1, got 1: to hear of no failure use action="ignore"'
            )


def check_on_failure(owner: str, on_failure: object) -> None:
    """Raise `ValueError` unless `on_failure` names a policy or is one."""
    named = isinstance(on_failure, str) and on_failure in get_args(OnFailure)
    if not named and not isinstance(on_failure, FailurePolicy):
        raise ValueError(
            f"{owner}: on_failure must be one of {get_args(OnFailure)} or a deqlib.FailurePolicy, "
            f"got {on_failure!r}"
        )


@dataclass(frozen=True, eq=False)
class Attempt:
    """A solve as its caller asked for it.

    Attributes:
        caller: who asked.
        name: of the solve: `FORWARD`, "adjoint solve", "tangent solve" or a backward mode's own.
        solver: the method.
        stopping: the rule.
        mode: class of the backward mode, whose settings those of an adjoint are.
        dtype: the coarsest type that the cell computes in.
    """

    caller: Caller
    name: str
    solver: Solver
    stopping: Stopping
    mode: str
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """ "forward", "adjoint", "tangent", or whatever else a backward mode solves."""
        return "forward" if self.name == FORWARD else self.name.removesuffix(" solve")

    @property
    def owner(self) -> str:
        """Where its settings are given."""
        return "" if self.kind == "forward" else f"{self.mode}'s "


def report_failure(
    attempt: Attempt,
    solution: Solution,
    on_failure: OnFailure | FailurePolicy,
    start: Tensor,
    shaped: Callable[[Solution], Solution],
) -> None:
    """Apply the failure policy to a finished solve.

    Args:
        attempt: what was asked for.
        solution: what was found, its value flat, (B, D); nothing is done if no sample failed, or no more than
            are tolerated.
        on_failure: the policy.
        start: where it began, (B, D).
        shaped: makes of a flat solution what the caller knows.

    Raises:
        NonConvergenceError: too many samples failed, and the policy is "raise".
    """
    policy = on_failure if isinstance(on_failure, FailurePolicy) else FailurePolicy(action=on_failure)
    if policy.action == "ignore":
        return
    counts = {status: n for status, n in solution.counts().items() if status.is_failure}
    total, failed = solution.status.numel(), sum(counts.values())
    if not failed or failed / total <= policy.tolerated:
        return
    whose = f"{attempt.name} of {attempt.caller}"
    reasons = ", ".join(f"{n} {status.name}" for status, n in counts.items())
    assert solution.relative_residual is not None  # a failure status implies a measured residual
    worst = float(solution.relative_residual.max())
    stayed = _num_unmoved(solution, start)
    advice = "; ".join(_advice(attempt, solution, counts, is_lost=stayed == failed))
    message = (
        f"{whose}: {failed} of {total} samples did not converge ({reasons}), worst relative residual "
        f"{worst:.1e} after {solution.nfe} evaluations; "
        f"{_what_is_kept(attempt, failed, stayed)}. What to try: {advice}."
    )
    if policy.action == "raise":
        raise NonConvergenceError(message, shaped(solution))
    # The same to filters of warnings whatever the numbers are: of one layer, pass and sorts of failure.
    template = f"{whose}: {', '.join(status.name for status in counts)}"
    warning = NonConvergenceWarning(
        message, layer=attempt.caller.label, kind=attempt.kind, counts=counts, template=template
    )
    warnings.warn(warning, stacklevel=levels_to_caller())


def _num_unmoved(solution: Solution, start: Tensor) -> int:
    """How many samples failed, and have no iterate that is better than where they began."""
    codes = [status for status in Status if status.is_failure]
    lost = torch.isin(solution.status, solution.status.new_tensor(codes))
    value: Tensor = solution.value
    unmoved = ((value == start) | (value.isnan() & start.isnan())).all(1) & lost
    return int(unmoved.sum())


def _what_is_kept(attempt: Attempt, failed: int, number: int) -> str:
    """Whether the values of failed samples are better than where they began, as for a number they are not."""
    where = "value holds" if attempt.kind == "forward" else "is used"
    which = "last" if attempt.stopping.keeps_last else "best"
    if not number:
        return f"the {which} iterate is kept"
    who = "none of them has an" if number == failed else f"{number} of them have no"
    return f"{who} iterate better than the start, which is what {where}" + (
        "" if number == failed else f"; of the others the {which} iterate is kept"
    )


def _advice(
    attempt: Attempt, solution: Solution, statuses: Iterable[Status], *, is_lost: bool
) -> Iterator[str]:
    """What can be changed of what is in use, for every status what was not said of one before.

    A cell of which no iterate is better than the start is hardly a contraction: more steps are no way then.
    """
    said: set[str] = set()
    for status in statuses:
        precise = _precision(attempt, solution, status)
        first = [_CONTRACT] if is_lost and status == Status.MAX_STEPS else []
        ways = [way for way in dict.fromkeys(first + _WAYS[status](attempt)) if way and way not in said]
        told = [precise] if precise and precise not in said else []
        told += ["otherwise " * bool(precise) + _joined(ways)] if ways else []
        said |= {precise, *ways}
        if told:
            yield f"{status.name}: {'; '.join(told)}"


def _precision(attempt: Attempt, solution: Solution, status: Status) -> str:
    """What to do where samples got as far as the type of the cell allows, and no tolerance below is met."""
    rtol, eps = attempt.stopping.rtol, torch.finfo(attempt.dtype).eps
    assert rtol is not None  # a failure implies a tolerance
    assert solution.relative_residual is not None
    residual = solution.relative_residual[solution.status == status]
    # A tolerance of 0 beside a readout is there to leave the decision to that.
    is_unwanted = rtol == 0 and attempt.stopping.readout is not None
    if is_unwanted or status == Status.COUPLED or rtol >= eps or not bool((residual <= _FLOOR * eps).any()):
        return ""
    kind = str(attempt.dtype).removeprefix("torch.")
    wider = "float64" if attempt.dtype == torch.float32 else "float32, outside of autocast"
    return (
        f"the cell computes in {kind}, whose resolution of {eps:.0e} is coarser than {attempt.owner}rtol="
        f"{rtol:g}: take rtol={_rounded_up(eps):g}, or compute the cell in {wider}"
    )


def _rounded_up(eps: float) -> float:
    """The next number of one digit."""
    digit, power = f"{eps:.0e}".split("e")
    found = float(f"{digit}e{power}")
    return found if found >= eps else float(f"{int(digit) + 1}e{power}")


def _out_of_steps(attempt: Attempt) -> list[str]:
    return [
        f"raise {_rule(attempt, f'max_steps (now {attempt.stopping.max_steps})')}",
        _looser(attempt),
        _other_solver(attempt) or _CONTRACT,
    ]


def _stalled(attempt: Attempt) -> list[str]:
    patience = attempt.stopping.patience
    return [
        _other_solver(attempt) or _CONTRACT,
        _looser(attempt),
        f"raise {_rule(attempt, f'patience (now {patience})')}" if patience is not None else "",
    ]


def _looser(attempt: Attempt) -> str:
    """The tolerances in use, and none that is not."""
    rule = attempt.stopping
    names = [name for name in ("rtol", "atol") if getattr(rule, name)]
    if rule.readout is not None and not names:
        return f"loosen {_rule(attempt, f'readout (now {rule.readout})')}"
    names = names or ["rtol"]
    now = " or ".join(f"{name} (now {getattr(rule, name):g})" for name in names)
    return f"loosen {_rule(attempt, now)}"


def _diverged(attempt: Attempt) -> list[str]:
    if attempt.kind != "forward":
        cell = "make the cell contractive where the forward solve ends (normalise it, scale its weights down)"
        return [cell, _other_solver(attempt), "look for NaN in the gradient that comes back"]
    # A setting, not what a method without one reports.
    damping = vars(attempt.solver).get("damping")
    lower = "" if damping is None else f"use damping (now {damping:g})"
    return [
        "make the cell contractive (normalise it, scale its weights down)",
        lower,
        _other_solver(attempt),
        "look for NaN in its inputs",
    ]


def _coupled(attempt: Attempt) -> list[str]:
    return [
        "they met the tolerance while others moved, and do not as the batch is returned: samples seem to "
        "depend on one another (a state without a batch axis? nodes of a graph as samples? BatchNorm or "
        "attention over the batch? a cell that draws random numbers?); make what belongs together one sample "
        "by a batch axis, z0[None], or keep samples apart"
    ]


_WAYS: dict[Status, Callable[[Attempt], list[str]]] = {
    Status.MAX_STEPS: _out_of_steps,
    Status.STALLED: _stalled,
    Status.DIVERGED: _diverged,
    Status.COUPLED: _coupled,
}


def _rule(attempt: Attempt, setting: str) -> str:
    """A setting of the stopping rule, by where it is given."""
    if attempt.kind == "forward":
        return f"Stopping.{setting}"
    return f"{setting} of {attempt.mode}(stopping=...)"


def _other_solver(attempt: Attempt) -> str:
    """To use the one that tries several, unless that is what is used."""
    if isinstance(attempt.solver, Auto):
        return ""
    now = type(attempt.solver).__name__
    if attempt.kind == "forward":
        return f"use solver=Auto(), which tries several methods (now {now})"
    return f"use {attempt.mode}(solver=Auto()), which tries several methods (now {now})"


def _joined(parts: list[str]) -> str:
    """ "a, b, or c"."""
    *rest, last = parts
    return f"{', '.join(rest)}{',' * (len(rest) > 1)} or {last}" if rest else last

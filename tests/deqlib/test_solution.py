from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from problems import problem
from torch import Tensor

from deqlib import (
    JFB,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    NonConvergenceWarning,
    Picard,
    Solution,
    Status,
    StochasticJFB,
    Stopping,
    fixed_point,
)

STEPS = torch.tensor([0.0, 0.1, 0.97, 2.0]).unsqueeze(1)  # contraction of each sample


def mixed(on_failure: str, **settings: Any) -> Solution:
    """Two samples converge, one runs out of steps, one diverges."""
    f = lambda z: {"h": STEPS * z["h"] + 1}  # noqa: E731
    settings = {"stopping": Stopping(max_steps=30, patience=None), **settings}
    return fixed_point(f, {"h": torch.zeros(4, 3)}, solver=Picard(), on_failure=on_failure, **settings)


def test_counts_are_by_status_without_the_absent() -> None:
    solution = mixed("ignore")
    assert solution.counts() == {Status.CONVERGED: 2, Status.MAX_STEPS: 1, Status.DIVERGED: 1}
    assert solution.converged.tolist() == [True, True, False, False]


def test_the_repr_is_one_readable_line() -> None:
    text = repr(mixed("ignore"))
    assert re.fullmatch(
        r"Solution\(2 converged, 1 max_steps, 1 diverged; nfe=\d+, steps=1\.\.\d+, "
        r"worst relative residual=\d\.\de[+-]\d\d\)",
        text,
    )
    fixed = fixed_point(lambda z: z, torch.ones(2, 1), stopping=Stopping.steps(3), backward=JFB())
    assert repr(fixed) == "Solution(2 completed; nfe=4, steps=3)"
    assert repr(fixed_point(lambda z: z, torch.ones(0, 1), backward=JFB())) == "Solution(no samples; nfe=2)"


def test_raise_throws_with_the_solution_in_the_structure_of_the_state() -> None:
    with pytest.raises(NonConvergenceError, match="2 of 4 samples did not converge") as caught:
        mixed("raise")
    solution = caught.value.solution
    assert solution.counts() == mixed("ignore").counts()
    assert solution.value["h"].shape == (4, 3)
    assert torch.equal(solution.value["h"], mixed("ignore").value["h"])


def test_warn_warns_once_with_counts_by_status_and_what_to_try() -> None:
    with pytest.warns(NonConvergenceWarning) as caught:
        solution = mixed("warn")
    assert [warning.filename for warning in caught] == [__file__]  # the caller's line, not the library's
    message = str(caught[0].message)
    for words in (
        "fixed-point solve of mixed.<locals>.<lambda> (test_solution.py:",
        "): 2 of 4 samples",
        "1 MAX_STEPS, 1 DIVERGED",
        f"worst relative residual {float(solution.relative_residual.max()):.1e}",
        "MAX_STEPS: raise Stopping.max_steps",
        "DIVERGED: make the cell contractive",
    ):
        assert words in message
    assert "STALLED" not in message
    assert torch.equal(solution.value["h"], mixed("ignore").value["h"])


def test_warn_is_the_default() -> None:
    with pytest.warns(NonConvergenceWarning):
        fixed_point(lambda z: 2 * z + 1, torch.zeros(1, 1), solver=Picard())
    with pytest.warns(NonConvergenceWarning):
        ImplicitLayer(lambda z, x: 2 * z + x, solver=Picard())(torch.ones(1, 1))


@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_a_solve_without_failures_says_nothing(on_failure: str) -> None:
    for stopping in (Stopping(), Stopping.steps(1), Stopping.steps(1, measure=True)):
        solution = fixed_point(
            lambda z: 0.1 * z + 1, torch.zeros(3, 2), stopping=stopping, on_failure=on_failure
        )
        assert not any(status.is_failure for status in solution.counts())


def test_ignore_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed("ignore")


def test_stalling_is_reported_as_such() -> None:
    with pytest.warns(
        NonConvergenceWarning, match=r"1 STALLED.*STALLED: use solver=Auto\(\), .*, loosen Stopping\.rtol"
    ):
        fixed_point(lambda z: -z + 1, torch.zeros(1, 1), solver=Picard(), stopping=Stopping(patience=3))


def adjoint_failure(on_failure: str) -> tuple[Tensor, Tensor]:
    """A forward solve that converges and an adjoint that two of three samples cannot finish."""
    base = problem(contraction=0.9).requiring_grad()
    backward = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-9, max_steps=3))
    solution = fixed_point(
        base.f, base.z0, stopping=Stopping(rtol=1e-9), backward=backward, on_failure=on_failure
    )
    g = torch.ones_like(solution.value)
    g[1] = 0  # nothing to solve for this sample
    return torch.autograd.grad(solution.value, base.inputs[0], g)[0], g


def test_an_adjoint_that_fails_raises_where_the_policy_says_so() -> None:
    with pytest.raises(
        NonConvergenceError, match=r"^adjoint solve of .*: 2 of 3 samples did not converge"
    ) as caught:
        adjoint_failure("raise")
    assert caught.value.solution.counts() == {Status.CONVERGED: 1, Status.MAX_STEPS: 2}


def test_an_adjoint_that_fails_warns_once_and_keeps_the_best_iterate() -> None:
    with pytest.warns(NonConvergenceWarning, match="^adjoint solve of .*: 2 of 3") as caught:
        gradient, _ = adjoint_failure("warn")
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(gradient, adjoint_failure("ignore")[0])
    assert gradient[[0, 2]].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


def test_forward_and_adjoint_failures_are_reported_apart() -> None:
    base = problem(contraction=0.9).requiring_grad()
    few = Stopping(rtol=1e-9, max_steps=2)
    backward = ImplicitDifferentiation(solver=Picard(), stopping=few)
    with pytest.warns(NonConvergenceWarning, match=r"^fixed-point solve") as forward:
        solution = fixed_point(base.f, base.z0, stopping=few, backward=backward)
    with pytest.warns(NonConvergenceWarning, match=r"^adjoint solve") as adjoint:
        solution.value.sum().backward()
    assert len(forward) == len(adjoint) == 1


def test_random_depth_has_no_tolerance_to_fail() -> None:
    solution = mixed("raise", backward=StochasticJFB(no_grad=(2, 2), grad=(1, 1)))
    assert solution.counts() == {Status.COMPLETED: 4}

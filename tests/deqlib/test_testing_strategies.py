from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from deqlib import Picard, Stopping, fixed_point
from deqlib.state import flatten
from deqlib.testing import Problem, two_cycle
from deqlib.testing.strategies import PytreeProblem, contractions, pytree_problems, states

REACH = {torch.float32: 1e-3, torch.float64: 1e-8}


@settings(max_examples=60)
@given(problem=contractions())
def test_a_drawn_contraction_has_the_solution_that_it_claims(problem: Problem) -> None:
    residual, relative = problem.to(torch.float64).residuals(problem.solution.double())
    eps = torch.finfo(problem.z0.dtype).eps
    assert (relative <= 20 * eps).all()
    assert problem.z0.dtype == problem.solution.dtype
    assert problem.z0.shape == problem.solution.shape
    assert residual.isfinite().all()


@settings(max_examples=60)
@given(problem=contractions())
def test_picard_solves_every_drawn_contraction(problem: Problem) -> None:
    dtype = problem.z0.dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    with torch.no_grad():
        solution = fixed_point(
            problem.cell,
            problem.z0,
            problem.inputs,
            solver=Picard(),
            stopping=Stopping(rtol=rtol, max_steps=500, patience=None),
            on_failure="raise",
        )
    torch.testing.assert_close(solution.value, problem.solution, rtol=REACH[dtype], atol=REACH[dtype])


@given(
    data=st.data(), max_rate=st.floats(0.1, 0.95), max_batch=st.integers(1, 5), max_width=st.integers(2, 7)
)
def test_drawn_contractions_keep_within_the_limits(
    data: Any, max_rate: float, max_batch: int, max_width: int
) -> None:
    limits = {"max_rate": max_rate, "max_batch": max_batch, "max_width": max_width}
    problem = data.draw(contractions(**limits, dtypes=[torch.float64]))
    assert problem.z0.dtype == torch.float64
    assert 1 <= len(problem.z0) <= max_batch
    assert 1 <= problem.z0.shape[-1] <= max_width
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: problem.f(flat.view_as(problem.z0)).flatten(), problem.solution.flatten()
    )
    assert float(torch.linalg.eigvals(jacobian).abs().max()) <= max_rate + 1e-6


@given(problem=contractions(max_batch=5))
def test_no_shared_input_of_a_contraction_looks_like_a_batch(problem: Problem) -> None:
    assert all(len(x) != len(problem.z0) for x in problem.inputs[1:] if x.dim() == 2 and x.shape[1] != 1)


def draws(strategy: st.SearchStrategy[Any], number: int = 150) -> list[Any]:
    drawn = []

    @settings(max_examples=number, phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        drawn.append(value)

    collect()
    return drawn


def test_every_kind_of_contraction_is_drawn() -> None:
    drawn = draws(contractions())
    assert {problem.name for problem in drawn} == {"linear", "tanh RNN", "mixed difficulty", "MLP"}
    assert {problem.z0.dtype for problem in drawn} == {torch.float32, torch.float64}


@pytest.mark.parametrize("limits", [{"max_rate": 1.0}, {"max_rate": 0.0}, {"max_batch": 0}, {"max_width": 1}])
def test_limits_out_of_range_are_refused_by_name(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"contractions: .*{next(iter(limits))}"):
        draws(contractions(**limits), 1)


@given(tree=states(min_batch=1, max_batch=3, max_leaves=5, max_axes=2, max_length=4))
def test_a_drawn_state_is_a_state(tree: Any) -> None:
    leaves = tree_leaves(tree)
    assert 1 <= len(leaves) <= 5
    assert 1 <= len(leaves[0]) <= 3
    for leaf in leaves:
        assert isinstance(leaf, Tensor)
        assert leaf.is_floating_point()
        assert leaf.dim() <= 3
        assert all(length <= 4 for length in leaf.shape[1:])
    f, flat = flatten(lambda z: z, tree)  # raises unless the leaves share the batch
    assert torch.equal(f(flat), flat)


def test_states_of_every_kind_are_drawn() -> None:
    drawn = draws(states())
    for kind in (Tensor, tuple, list, dict):
        assert any(isinstance(tree, kind) for tree in drawn)
    leaves = [tree_leaves(tree) for tree in drawn]
    assert any(len(several) > 2 for several in leaves)
    assert any(len(several[0]) == 0 for several in leaves)  # no samples
    assert any(several[0].numel() == 0 < len(several[0]) for several in leaves)  # samples of no numbers
    assert any(several[0].dim() == 1 for several in leaves)
    assert any(len({leaf.dtype for leaf in several}) > 1 for several in leaves)


@given(problem=pytree_problems(max_rate=0.8))
def test_picard_solves_every_drawn_pytree_problem(problem: PytreeProblem) -> None:
    torch.testing.assert_close(problem.f(problem.solution), problem.solution, rtol=0, atol=0)
    with torch.no_grad():
        solution = fixed_point(
            problem.cell,
            problem.z0,
            problem.inputs,
            solver=Picard(),
            stopping=Stopping(rtol=1e-5, atol=1e-6, max_steps=200),
            on_failure="raise",
            compact=True,
        )
    torch.testing.assert_close(solution.value, problem.solution, rtol=1e-3, atol=1e-3)


@given(problem=pytree_problems(dtypes=[torch.float64]), seed=st.integers(0, 99))
def test_a_pytree_problem_contracts_by_its_rate(problem: PytreeProblem, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = tree_map(
        lambda leaf: leaf + torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), problem.solution
    )
    before = _distance(other, problem.solution)
    after = _distance(problem.f(other), problem.solution)
    assert after <= problem.rate * before + 1e-12


def _distance(a: Any, b: Any) -> float:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return float(sum((x - y).square().sum() for x, y in pairs)) ** 0.5


def test_the_library_does_not_need_the_test_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "deqlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("hypothesis", "pytest"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    fresh = importlib.import_module("deqlib.testing")
    assert fresh.two_cycle is not two_cycle  # imported anew
    told = r"hypothesis.*pip install 'deqlib\[testing\]'"
    with pytest.raises(ImportError, match=told):
        importlib.import_module("deqlib.testing.strategies")
    with pytest.raises(ImportError, match=f"SolverConformance needs .*{told}"):
        _ = fresh.SolverConformance

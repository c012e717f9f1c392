from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, Spy, as_pytree, dense_gradients, made, problem, problems, sample_of, solution_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    Solver,
    Stopping,
    fixed_point,
)
from deqlib.backward.shared_inverse import SharedInverse
from deqlib.diagnostics import saved_bytes
from deqlib.driver import iterate
from deqlib.solvers.secant import SecantSolver, SecantState

SHORT = 1e-12  # the step takes a history to be worthless for what is much longer than its columns
EXACT = Stopping(rtol=1e-13, max_steps=100, patience=None)
SECANT: dict[str, SecantSolver] = {
    "broyden": Broyden(),
    "broyden of little memory": Broyden(memory=3),
    "anderson": Anderson(),
    "anderson I": Anderson(kind="I"),
}


def by_solver(solvers: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("solver", solvers.values(), ids=solvers)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nonsymmetric(seed: int, batch: int, width: int, radius: float, cell: str = "linear") -> Problem:
    """A random map whose Jacobian has about this spectral radius and no small norm."""
    weight = normal(seed, width, width)
    weight = weight * (radius / float(torch.linalg.eigvals(weight).abs().max()))
    x = normal(seed + 1, batch, width)
    if cell == "linear":
        return made(lambda z, x, w: z @ w + x, x, weight)
    return made(lambda z, x, w: torch.tanh(z @ w + 0.1 * x), x, weight)


def gradients(
    base: Problem, backward: Backward, g: Tensor, *, solver: Solver | None = None, **settings: Any
) -> tuple[Tensor, ...]:
    settings = {"stopping": EXACT, "on_failure": "ignore", **settings}
    value = fixed_point(base.f, base.z0, backward=backward, solver=solver or Broyden(), **settings).value
    return torch.autograd.grad(value, base.inputs, g)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def history(state: SecantState) -> tuple[Tensor, ...]:
    known = state.history
    return known.df, known.left, known.system.matrix, known.columns()


def dense_inverse(solver: SecantSolver, state: SecantState, width: int) -> Tensor:
    """-B (B, D, D) of every sample, column by column: the step from 0 where f is short and along an axis."""
    zeros = torch.zeros(len(state.history.df), width, dtype=state.history.df.dtype)
    columns = []
    for i in range(width):
        image = zeros.clone()
        image[:, i] = SHORT
        columns.append(solver.step(zeros, image, solver.resume(state, zeros))[0])
    return torch.stack(columns, 2) / SHORT


# The transposed inverse ---------------------------------------------------------------------------------


@by_solver(SECANT)
@pytest.mark.parametrize("max_steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("ended", ["in the middle", "some converged"])
def test_it_is_the_transpose_of_what_the_forward_step_applies(
    solver: SecantSolver, max_steps: int, ended: str
) -> None:
    base = problem("tanh", batch=3, dim=7, contraction=0.9)
    speed = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64).unsqueeze(1)
    stopping = Stopping.steps(max_steps)
    if ended == "some converged":
        stopping = Stopping(rtol=1e-4, max_steps=max(max_steps, 1), patience=None)
    state = iterate(lambda z: speed * base.f(z), base.z0, solver, stopping).state
    g = normal(5, 3, 7)
    before = [tensor.clone() for tensor in history(state)]
    found = state.history.transposed(g)
    assert all(torch.equal(a, b) for a, b in zip(before, history(state), strict=True))
    expected = torch.einsum("bij,bi->bj", dense_inverse(solver, state, 7), g)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    if max_steps > 2:
        assert (found - g).norm() > 0.01


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12))
def test_it_is_the_transpose_of_broydens_updates_done_densely(seed: int, steps: int) -> None:
    base = nonsymmetric(seed, 1, 8, 0.7, "tanh")
    f = Spy(base.f)
    state = iterate(f, base.z0, Broyden(memory=20), Stopping.steps(steps)).state
    residuals = [base.f(z) - z for z in f.states]
    inverse = -torch.eye(8, dtype=torch.float64)
    for i in range(len(f.states) - 1):
        dz, dr = (f.states[i + 1] - f.states[i])[0], (residuals[i + 1] - residuals[i])[0]
        inverse = inverse + torch.outer(dz - inverse @ dr, dz @ inverse) / (dz @ inverse @ dr)
    g = normal(seed, 1, 8)
    torch.testing.assert_close(state.history.transposed(g), -g @ inverse, rtol=1e-6, atol=1e-6)


def test_columns_that_a_sample_lost_are_not_used_even_where_they_are_not_finite() -> None:
    base = problem("tanh", batch=2, dim=6)
    state = iterate(base.f, base.z0, Broyden(), Stopping.steps(5)).state
    g = normal(0, 2, 6)
    expected = state.history.transposed(g)
    known = state.history
    known.valid = torch.nn.functional.pad(known.columns(), (0, known.df.shape[1] - known.num_columns))
    known.valid[1, :2] = False
    known.df[1, :2], known.left[1, :2] = float("nan"), float("inf")
    known.system.matrix[1, :2] = float("nan")
    found = state.history.transposed(g)
    assert torch.equal(found[0], expected[0])
    assert found[1].isfinite().all()


def test_a_sample_whose_system_is_singular_gets_g() -> None:
    base = problem("tanh", batch=2, dim=6)
    state = iterate(base.f, base.z0, Broyden(), Stopping.steps(5)).state
    g = normal(0, 2, 6)
    state.history.system.matrix[1] = 0
    found = state.history.transposed(g)
    assert torch.equal(found[1], g[1])
    assert not torch.equal(found[0], g[0])


# Gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "width"),
    [(Broyden(), 1), (Anderson(ridge=0.0), 1), (Anderson(memory=60, ridge=0.0), 5)],
    ids=["broyden of one unknown", "anderson of one unknown", "anderson"],
)
@given(seed=st.integers(0, 2**31))
def test_where_the_history_determines_the_jacobian_of_a_linear_cell_the_gradient_is_exact(
    solver: Solver, width: int, seed: int
) -> None:
    base = nonsymmetric(seed, 1, width, 0.8).requiring_grad()
    g = normal(seed, 1, width)
    found = gradients(base, SharedInverse(fallback_ratio=None), g, solver=solver)
    for ours, exact in zip(found, dense_gradients(base, g), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3 * float(exact.norm()))


def adjoints(base: Problem, backward: Backward, g: Tensor, **settings: Any) -> Tensor:
    """u (B, D): the gradient of x in a cell that adds it."""
    return gradients(base, backward, g, **settings)[0]


def exact_adjoint(base: Problem, g: Tensor) -> Tensor:
    return dense_gradients(base, g)[0]


@pytest.mark.parametrize("name", ["broyden", "anderson"])
def test_it_is_nearer_to_the_exact_gradient_than_jfb_on_slow_contractions(name: str) -> None:
    closeness = torch.nn.functional.cosine_similarity
    ours, jfb, wins = 0.0, 0.0, 0
    for seed in range(60):
        cell = ("linear", "tanh")[seed % 2]
        base = nonsymmetric(seed, 1, 40, 0.9, cell).requiring_grad()
        g = normal(seed + 1000, 1, 40)
        exact = flat(dense_gradients(base, g))
        settings = {"solver": SECANT[name], "stopping": Stopping(rtol=1e-3, max_steps=100, patience=None)}
        mine = float(closeness(flat(gradients(base, SharedInverse(), g, **settings)), exact, dim=0))
        its = float(closeness(flat(gradients(base, JFB(), g, **settings)), exact, dim=0))
        ours, jfb, wins = ours + mine / 60, jfb + its / 60, wins + (mine >= its)
    assert ours > jfb + 0.04
    assert wins >= 45


@by_solver({"broyden": Broyden(), "anderson": Anderson()})
def test_refining_approaches_the_exact_gradient(solver: Solver) -> None:
    depths = [0, 1, 2, 4, 8, 16]
    errors = torch.zeros(len(depths))
    for seed in range(12):
        base = nonsymmetric(seed, 2, 14, 0.9, ("linear", "tanh")[seed % 2]).requiring_grad()
        g = normal(seed, 2, 14)
        exact = flat(dense_gradients(base, g))
        settings = {"solver": solver, "stopping": Stopping(rtol=1e-7, max_steps=100, patience=None)}
        for i, refine in enumerate(depths):
            found = flat(gradients(base, SharedInverse(refine=refine), g, **settings))
            errors[i] += float((found - exact).norm() / exact.norm()) / 12
    assert (errors[1:] < 0.9 * errors[:-1]).all(), errors
    assert errors[-1] < 1e-5


def test_the_history_makes_the_refining_steps_better() -> None:
    ours, plain = 0.0, 0.0
    for seed in range(12):
        base = nonsymmetric(seed, 1, 40, 0.9, "tanh").requiring_grad()
        g = normal(seed, 1, 40)
        exact = flat(dense_gradients(base, g))
        stopping = Stopping(rtol=1e-5, max_steps=100, patience=None)
        for ratio in (None, 1e-9):  # nothing is trusted: GMRES from g
            backward = SharedInverse(refine=5, fallback_ratio=ratio)
            found = flat(gradients(base, backward, g, stopping=stopping))
            error = float((found - exact).norm() / exact.norm())
            ours, plain = (ours + error, plain) if ratio is None else (ours, plain + error)
    assert ours < 0.3 * plain  # GMRES without the preconditioner, from where the history starts it: 0.6


def test_every_refining_step_is_one_product_with_the_jacobian() -> None:
    base = problem("linear", dim=6).requiring_grad()
    for refine in (0, 1, 4):
        products: list[Tensor] = []

        def cell(z: Tensor, products: list[Tensor] = products) -> Tensor:
            image = base.f(z)
            if image.requires_grad:
                image.register_hook(products.append)
            return image

        value = fixed_point(cell, base.z0, solver=Broyden(), backward=SharedInverse(refine=refine)).value
        value.sum().backward()
        assert len(products) == refine + 1


# What is trusted ----------------------------------------------------------------------------------------


def test_samples_whose_adjoint_is_longer_than_trusted_fall_back_by_themselves() -> None:
    base = nonsymmetric(0, 6, 8, 0.9).requiring_grad()
    g = normal(1, 6, 8)
    free = adjoints(base, SharedInverse(fallback_ratio=None), g)
    ratios = free.norm(dim=1) / g.norm(dim=1)
    bound = float(ratios.median())
    found = adjoints(base, SharedInverse(fallback_ratio=bound), g)
    trusted = ratios <= bound
    assert 0 < int(trusted.sum()) < 6
    assert torch.equal(found[trusted], free[trusted])
    assert torch.equal(found[~trusted], g[~trusted])


@by_solver(SECANT)
def test_where_nothing_is_trusted_it_is_jfb(solver: Solver) -> None:
    base = problem("tanh", contraction=0.9).requiring_grad()
    g = normal(1, 3, 5)
    found = gradients(base, SharedInverse(fallback_ratio=1e-9), g, solver=solver)
    for ours, expected in zip(found, gradients(base, JFB(), g, solver=solver), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_a_solve_that_learnt_nothing_gives_the_gradient_of_jfb() -> None:
    base = problem("tanh").requiring_grad()
    start = solution_of(base)
    g = normal(1, 3, 5)
    solution = fixed_point(base.f, start, solver=Broyden(), backward=SharedInverse())
    assert solution.num_steps.tolist() == [0, 0, 0]
    found = torch.autograd.grad(solution.value, base.inputs, g)
    expected = torch.autograd.grad(fixed_point(base.f, start, backward=JFB()).value, base.inputs, g)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("ratio", [None, 2.0])
def test_a_gradient_of_zero_stays_zero(refine: int, ratio: float | None) -> None:
    base = problem("tanh").requiring_grad()
    g = normal(1, 3, 5)
    g[1] = 0
    found = gradients(base, SharedInverse(refine=refine, fallback_ratio=ratio), g)[0]
    assert found[1].tolist() == [0.0] * 5
    assert found.isfinite().all()
    assert found[0].norm() > 0


# Samples by themselves ----------------------------------------------------------------------------------


@by_solver(SECANT)
@pytest.mark.parametrize("refine", [0, 3])
@given(base=problems(dtype=torch.float64, max_contraction=0.8))
def test_a_sample_alone_has_the_gradient_that_it_has_in_its_batch(
    solver: Solver, refine: int, base: Problem
) -> None:
    stopping = Stopping(rtol=1e-5, max_steps=60)
    g = normal(0, *base.z0.shape)
    backward = SharedInverse(refine=refine)
    together = adjoints(base.requiring_grad(), backward, g, solver=solver, stopping=stopping)
    for i in range(len(g)):
        sample = sample_of(base, i).requiring_grad()
        alone = adjoints(sample, backward, g[i : i + 1], solver=solver, stopping=stopping)
        # Rounding is amplified where differences are nearly parallel.
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@by_solver(SECANT)
@pytest.mark.parametrize("refine", [0, 3])
def test_a_sample_that_is_not_finite_leaves_its_batch_mates_gradients_alone(
    solver: Solver, refine: int
) -> None:
    base = problem(batch=4)
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        x = base.inputs[0].clone()
        x[1] += bad
        x.requires_grad_()
        f = lambda z, x=x: base.cell(z, x, *base.inputs[1:])  # noqa: E731
        settings = {"solver": solver, "backward": SharedInverse(refine=refine), "on_failure": "ignore"}
        value = fixed_point(f, base.z0, **settings).value
        results.append(torch.autograd.grad(value, x, torch.ones_like(value))[0][[0, 2, 3]])
    assert results[0].norm() > 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_bad_gradient_of_one_sample_stays_its_own() -> None:
    base = problem("tanh").requiring_grad()
    g = normal(1, 3, 5)
    expected = adjoints(base, SharedInverse(refine=2), g)
    g[1, 0] = float("nan")
    found = adjoints(base, SharedInverse(refine=2), g)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_finished_samples_may_leave_the_batch() -> None:
    base = nonsymmetric(0, 6, 8, 0.8, "tanh").requiring_grad()
    speed = torch.linspace(0.05, 1, 6, dtype=torch.float64).unsqueeze(1)
    g = normal(1, 6, 8)
    found = []
    for compact in (False, True):
        f = lambda z, x, speed: speed * base.cell(z, x, base.inputs[1])  # noqa: E731
        settings = {"solver": Broyden(), "stopping": Stopping(rtol=1e-6), "compact": compact}
        inputs = (base.inputs[0], speed)
        solution = fixed_point(f, base.z0, inputs, backward=SharedInverse(), **settings)
        assert len(set(solution.num_steps.tolist())) > 2
        found.append(torch.autograd.grad(solution.value, base.inputs, g)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


# States, precision, memory ------------------------------------------------------------------------------


def test_a_pytree_state_has_the_gradients_of_the_same_numbers_in_one_tensor() -> None:
    base = problem("mlp", dim=7).requiring_grad()

    cell, z0 = as_pytree(base)
    g = normal(0, 3, 7)
    settings = {"solver": Broyden(), "backward": SharedInverse(refine=2), "stopping": Stopping(rtol=1e-9)}
    tree = fixed_point(cell, z0, **settings).value
    loss = (tree["h"] * g[:, :3]).sum() + (tree["rest"][0].flatten(1) * g[:, 3:]).sum()
    ours = torch.autograd.grad(loss, base.inputs)
    for a, b in zip(ours, gradients(base, SharedInverse(refine=2), g, **settings_of(settings)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "backward"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_gives_nearly_the_same_gradient(dtype: torch.dtype) -> None:
    found = []
    for kind in (torch.float64, dtype):
        base = problem("tanh", dim=8, contraction=0.7, dtype=kind).requiring_grad()
        stopping = Stopping(rtol=2e-2 if dtype == torch.bfloat16 else 1e-4)
        g = normal(0, 3, 8).to(kind)
        found.append(flat(gradients(base, SharedInverse(), g, stopping=stopping)).double())
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-3
    assert (found[0] - found[1]).norm() < tolerance * found[0].norm()


@pytest.mark.parametrize("refine", [0, 2])
def test_a_backward_pass_under_autocast_uses_the_history_in_its_own_precision(refine: int) -> None:
    base = problem("tanh", dim=8, contraction=0.9, dtype=torch.float32).requiring_grad()
    cell = lambda z, x, w: torch.tanh((z.unsqueeze(2) * w).sum(1) + x)  # noqa: E731  # nothing autocast does
    base = replace(base, cell=cell)
    g = normal(0, 3, 8).float()
    found = []
    for enabled in (False, True):
        settings = {"solver": Broyden(), "stopping": Stopping(rtol=1e-4, max_steps=60)}
        value = fixed_point(base.f, base.z0, backward=SharedInverse(refine=refine), **settings).value
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(value, base.inputs[0], g)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Kept:
    """A tensor as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@pytest.mark.parametrize("differentiate", [True, False], ids=["after backward", "without backward"])
def test_autograd_keeps_the_history_and_frees_it_with_the_graph_without_the_garbage_collector(
    differentiate: bool,
) -> None:
    base = problem("tanh").requiring_grad()
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            solution = fixed_point(base.f, base.z0, solver=Broyden(), backward=SharedInverse(refine=2))
        learnt = solution.state.history
        history = {learnt.df.data_ptr(), learnt.left.data_ptr()}
        state, value = weakref.ref(solution.state), solution.value
        del solution, learnt
        assert state() is None
        assert history <= {kept.tensor.data_ptr() for kept in alive}
        if differentiate:
            value.sum().backward()  # frees what was saved, though the value lives on
        else:
            del value
        assert not alive
    finally:
        gc.enable()


def test_under_activation_checkpointing_the_history_is_computed_again() -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell, solver=Broyden(), backward=SharedInverse(refine=2))
    expected = torch.autograd.grad(layer(*base.inputs).sum(), base.inputs)

    def forward() -> Tensor:
        return checkpoint(layer, *base.inputs, use_reentrant=False)

    held = saved_bytes(forward, exclude=base.inputs)
    assert held < saved_bytes(lambda: layer(*base.inputs), exclude=base.inputs) / 10
    found = torch.autograd.grad(forward().sum(), base.inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_solve_that_goes_on_from_the_state_leaves_the_gradient_alone() -> None:
    base = problem("tanh", contraction=0.9).requiring_grad()
    g = normal(1, 3, 5)
    settings = {"solver": Broyden(memory=4), "stopping": Stopping(rtol=1e-4), "backward": SharedInverse()}
    first = fixed_point(base.f, base.z0, **settings)
    (expected,) = torch.autograd.grad(first.value, base.inputs[:1], g, retain_graph=True)
    shifted = lambda z: base.f(z) + 0.1  # noqa: E731
    with torch.no_grad():
        fixed_point(shifted, first.value, state=first.state, **settings)
    (found,) = torch.autograd.grad(first.value, base.inputs[:1], g)
    assert torch.equal(found, expected)


def test_two_forwards_before_one_backward_are_independent() -> None:
    base = problem("tanh").requiring_grad()
    layer = ImplicitLayer(base.cell, solver=Broyden(), backward=SharedInverse(refine=1))
    xs = [normal(i, 3, 5).requires_grad_() for i in range(2)]
    apart = [torch.autograd.grad(layer(x, base.inputs[1]).square().sum(), x)[0] for x in xs]
    first, second = (layer(x, base.inputs[1]) for x in xs)
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), xs)
    torch.testing.assert_close(found, tuple(apart))


@by_solver(SECANT)
def test_the_value_is_that_of_a_solve_without_gradient(solver: Solver) -> None:
    base = problem("mlp").requiring_grad()
    settings = {"solver": solver, "backward": SharedInverse()}
    with torch.no_grad():
        plain = fixed_point(base.f, base.z0, **settings)
    found = fixed_point(base.f, base.z0, **settings)
    assert torch.equal(found.value, plain.value)
    assert found.nfe == plain.nfe + 1
    assert not plain.value.requires_grad
    assert found.value.requires_grad


def test_it_refuses_to_be_differentiated_twice() -> None:
    base = problem().requiring_grad()
    value = fixed_point(base.f, base.z0, solver=Broyden(), backward=SharedInverse()).value
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(value.sum(), base.inputs, create_graph=True)


# Settings -----------------------------------------------------------------------------------------------


@by_solver({"picard": Picard(), "newton": NewtonKrylov(), "auto": Auto()})
def test_solvers_that_leave_no_inverse_are_refused_with_the_way_out(solver: Solver) -> None:
    words = rf"SharedInverse: .*got {type(solver).__name__}.*use solver=Broyden\(\)"
    with pytest.raises(ValueError, match=words):
        ImplicitLayer(torch.tanh, solver=solver, backward=SharedInverse())
    with pytest.raises(ValueError, match=words):
        fixed_point(torch.tanh, torch.zeros(1, 2), solver=solver, backward=SharedInverse())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SharedInverse(refine=-1), ValueError, "SharedInverse: refine must be at least 0, got -1"),
        (lambda: SharedInverse(refine=1.0), TypeError, "SharedInverse: refine must be an int"),
        (lambda: SharedInverse(fallback_ratio=0.0), ValueError, "SharedInverse: fallback_ratio"),
        (lambda: SharedInverse(fallback_ratio="jfb"), TypeError, "fallback_ratio must be a number"),
        (lambda: SharedInverse(3), TypeError, "positional"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()

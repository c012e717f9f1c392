from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from problems import KINDS, TIGHT, Cell, Problem, Spy, as_pytree, dense_gradients, problem, problems
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deqlib import (
    GMRES,
    JFB,
    AdjointStart,
    Anderson,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    Solution,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.backward.tape import attach, on_tape, solve_off_tape, start_of_tape

EXACT = Stopping(rtol=TIGHT, max_steps=500, patience=None)
ADJOINT_SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.7),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "broyden memory below the steps": Broyden(memory=4),
    "gmres": GMRES(),
}
BACKWARDS: dict[str, Backward] = {
    "implicit": ImplicitDifferentiation(),
    "jfb": JFB(),
    "phantom unroll": PhantomGradient(steps=3),
    "phantom neumann": PhantomGradient(steps=3, form="neumann"),
    "stochastic": StochasticJFB(no_grad=(3, 3), grad=(2, 2)),
    "unroll": Unroll(),
}
FIRST_ORDER = {name: mode for name, mode in BACKWARDS.items() if name not in ("unroll", "implicit")}
OFF_TAPE = {name: mode for name, mode in BACKWARDS.items() if name not in ("unroll", "stochastic")}


def exactly(solver: Solver | None = None) -> ImplicitDifferentiation:
    return ImplicitDifferentiation(solver=solver or Anderson(), stopping=EXACT)


def by_mode(modes: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backward", modes.values(), ids=modes)


def gradients(base: Problem, backward: Backward, g: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """Of <g, z*> with respect to all that the cell captured by closure."""
    settings = {"stopping": EXACT, "on_failure": "ignore", **settings}
    value = fixed_point(base.f, base.z0, backward=backward, **settings).value
    return torch.autograd.grad(value, base.inputs, g)


def phantom_adjoint(steps: int, damping: float) -> Callable[[Tensor, Tensor], Tensor]:
    """u = beta sum_{i < k} (beta J^T + (1 - beta) I)^i g, dense."""

    def adjoint(transposed: Tensor, g: Tensor) -> Tensor:
        step = damping * transposed + (1 - damping) * torch.eye(len(g), dtype=g.dtype)
        return damping * sum(torch.linalg.matrix_power(step, i) @ g for i in range(steps))

    return adjoint


# Against dense linear algebra ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADJOINT_SOLVERS)
@given(base=problems(dtype=torch.float64, max_contraction=0.85))
def test_implicit_gradients_are_those_of_the_fixed_point(name: str, base: Problem) -> None:
    base = base.requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    backward = exactly(ADJOINT_SOLVERS[name])
    for ours, exact in zip(gradients(base, backward, g), dense_gradients(base, g), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Broyden(memory=4)], ids=repr)
@given(base=problems(dtype=torch.float64, max_contraction=0.6))
def test_unrolled_gradients_are_those_of_the_fixed_point_once_the_iteration_has_converged(
    solver: Solver, base: Problem
) -> None:
    base = base.requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    # A tolerance short of rounding: the error of the gradient is that of the iteration, amplified.
    found = gradients(base, Unroll(), g, solver=solver, stopping=Stopping(rtol=1e-10, max_steps=200))
    for ours, exact in zip(found, dense_gradients(base, g), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["unroll", "neumann"])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (1, 0.4), (2, 1.0), (3, 0.5), (7, 0.8)])
@pytest.mark.parametrize("kind", KINDS)
def test_phantom_gradients_are_the_truncated_damped_series(
    kind: str, steps: int, damping: float, form: str
) -> None:
    base = problem(kind, contraction=0.8).requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    backward = PhantomGradient(steps=steps, damping=damping, form=form)
    closed = dense_gradients(base, g, phantom_adjoint(steps, damping))
    for ours, exact in zip(gradients(base, backward, g), closed, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_jfb_is_the_first_term_of_the_series(kind: str) -> None:
    base = problem(kind, contraction=0.8).requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    closed = dense_gradients(base, g, lambda transposed, g: g)
    for ours, exact in zip(gradients(base, JFB(), g), closed, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_phantom_gradients_approach_the_implicit_ones_with_the_number_of_steps() -> None:
    base = problem("mlp", contraction=0.7).requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    exact = dense_gradients(base, g)[0]
    errors = [
        (gradients(base, PhantomGradient(steps=k, damping=1.0, form="neumann"), g)[0] - exact).norm()
        for k in (1, 4, 16, 64)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.1 * errors[1]
    assert errors[3] < 1e-9


def test_the_adjoints_tolerance_bounds_the_gradients_error() -> None:
    base = problem("mlp", contraction=0.9).requiring_grad()
    g = torch.randn(base.z0.shape, dtype=torch.float64)
    exact = dense_gradients(base, g)[0]
    for rtol in (1e-2, 1e-5, 1e-8):
        backward = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=rtol, max_steps=300))
        error = (gradients(base, backward, g)[0] - exact).norm() / exact.norm()
        assert error < 10 * rtol / (1 - 0.9)


# Warm-started adjoints ----------------------------------------------------------------------------------


def adjoint_products(base: Problem, g: Tensor, start: AdjointStart | None) -> tuple[tuple[Tensor, ...], int]:
    """Gradients, and how many products with J^T the backward pass took."""
    count = 0

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.view_as(z)

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return u

    stopping = Stopping(rtol=1e-10, max_steps=500, patience=None)
    backward = ImplicitDifferentiation(solver=Picard(), stopping=stopping, warm_start=start)
    f = lambda z: base.f(Counting.apply(z))  # noqa: E731
    value = fixed_point(f, base.z0, stopping=EXACT, backward=backward).value
    return torch.autograd.grad(value, base.inputs, g), count


def test_an_adjoint_started_from_the_last_one_is_the_same_and_takes_fewer_products() -> None:
    base = problem("mlp", contraction=0.9).requiring_grad()
    start, g = AdjointStart(), torch.randn(base.z0.shape, dtype=torch.float64)
    expected, cold = adjoint_products(base, g, None)
    first, at_first = adjoint_products(base, g, start)
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    assert at_first == cold
    again, repeated = adjoint_products(base, g, start)
    torch.testing.assert_close(again, expected, rtol=1e-8, atol=1e-10)
    assert repeated <= 2  # the one that measures, the one that passes the gradient on
    scaled, rescaled = adjoint_products(base, -3 * g, start)
    torch.testing.assert_close(scaled, tuple(-3 * t for t in expected), rtol=1e-8, atol=1e-10)
    assert rescaled <= 2
    nearby, near = adjoint_products(base, g + 1e-4 * torch.randn_like(g), start)
    assert near < 0.8 * cold
    close_to = sum(float((a - b).norm()) for a, b in zip(nearby, expected, strict=True))
    assert 0 < close_to < 1e-1


def test_a_start_that_does_not_fit_is_no_worse_than_none() -> None:
    base = problem("mlp", contraction=0.9).requiring_grad()
    start = AdjointStart()
    g = torch.zeros(base.z0.shape, dtype=torch.float64)
    g[:, 0] = 1
    adjoint_products(base, g, start)
    other = g.roll(1, 1)  # at right angles
    expected, cold = adjoint_products(base, other, None)
    found, taken = adjoint_products(base, other, start)
    assert taken == cold
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    smaller = problem("mlp", batch=2, contraction=0.9).requiring_grad()  # another shape: afresh
    torch.testing.assert_close(
        adjoint_products(smaller, g[:2], start), adjoint_products(smaller, g[:2], None), rtol=0, atol=0
    )


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_last_gradient_that_was_nothing_or_not_finite_is_forgotten(bad: float) -> None:
    start = AdjointStart()
    g = torch.ones(2, 3)
    g[1] = bad
    start.remember(g, 2 * g)
    guess = start.guess(torch.ones(2, 3))
    assert guess.tolist() == [[2.0] * 3, [1.0] * 3]


# Who receives gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [exactly(), Unroll()], ids=["implicit", "unroll"])
def test_gradcheck_passes_for_arguments(kind: str, backward: Backward) -> None:
    base = problem(kind, batch=2, dim=3, contraction=0.5).requiring_grad()

    def value(*tensors: Tensor) -> Tensor:
        stopping = Stopping(rtol=1e-12, max_steps=200)
        return fixed_point(base.cell, base.z0, tensors, stopping=stopping, backward=backward).value

    assert torch.autograd.gradcheck(value, base.inputs)


@by_mode(BACKWARDS)
def test_arguments_closures_and_parameters_receive_the_same_gradient(backward: Backward) -> None:
    cell = Cell(5).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    z0, settings = torch.zeros_like(x), {"backward": backward, "stopping": Stopping(rtol=1e-9)}
    wanted = (x, *cell.parameters())
    explicit = lambda z, x, w, b: torch.tanh(z @ w.T + b + x)  # noqa: E731
    weight, bias = cell.inner.weight, cell.inner.bias
    values = [
        ImplicitLayer(cell, **settings)(x),
        fixed_point(lambda z: cell(z, x), z0, **settings).value,
        fixed_point(explicit, z0, (x, weight, bias), **settings).value,
    ]
    found = [torch.autograd.grad(value.square().sum(), wanted) for value in values]
    for tensors in zip(*found, strict=True):
        assert tensors[0].norm() > 0
        for other in tensors[1:]:
            torch.testing.assert_close(other, tensors[0], rtol=1e-10, atol=1e-12)


@by_mode(BACKWARDS)
def test_a_pytree_state_has_the_gradients_of_the_same_numbers_in_one_tensor(backward: Backward) -> None:
    base = problem("mlp", dim=7).requiring_grad()

    cell, z0 = as_pytree(base)
    g = torch.randn(3, 7, dtype=torch.float64)
    settings = {"backward": backward, "stopping": Stopping(rtol=1e-9)}
    tree = fixed_point(cell, z0, **settings).value
    flat = fixed_point(base.f, base.z0, **settings).value
    assert torch.equal(torch.cat([tree["h"], tree["rest"][0].flatten(1)], 1), flat)
    loss = (tree["h"] * g[:, :3]).sum() + (tree["rest"][0].flatten(1) * g[:, 3:]).sum()
    ours = torch.autograd.grad(loss, base.inputs)
    for a, b in zip(ours, torch.autograd.grad(flat, base.inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@by_mode(BACKWARDS)
def test_a_leaf_of_the_state_that_the_loss_ignores_is_no_obstacle(backward: Backward) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    cell = lambda z: (0.5 * z[0] + x, 0.5 * z[1] + z[0])  # noqa: E731
    value = fixed_point(cell, (torch.zeros(2, 3), torch.zeros(2, 3)), backward=backward).value
    value[0].sum().backward()
    assert (x.grad > 0).all()


@by_mode(OFF_TAPE)
def test_modes_that_solve_off_the_tape_send_no_gradient_to_the_starting_point(backward: Backward) -> None:
    base = problem().requiring_grad()
    z0 = torch.zeros_like(base.z0, requires_grad=True)
    fixed_point(base.f, z0, backward=backward).value.sum().backward()
    assert z0.grad is None
    assert base.inputs[0].grad is not None


def test_unrolling_carries_gradient_to_the_starting_point() -> None:
    base = problem("linear")
    z0 = torch.zeros_like(base.z0, requires_grad=True)
    settings = {"solver": Picard(), "stopping": Stopping.steps(3)}
    value = fixed_point(base.f, z0, backward=Unroll(), **settings).value
    (ours,) = torch.autograd.grad(value, z0, torch.ones_like(value))
    expected = torch.ones_like(value) @ torch.linalg.matrix_power(base.inputs[1], 3).T
    torch.testing.assert_close(ours, expected)


@by_mode(BACKWARDS)
def test_a_cell_that_does_not_use_its_state_passes_its_own_gradient(backward: Backward) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    value = fixed_point(lambda z: 3 * x, torch.zeros(2, 3), backward=backward, solver=Picard()).value
    value.sum().backward()
    scale = (
        1 - 0.5**3
        if backward == BACKWARDS["phantom unroll"] or backward == BACKWARDS["phantom neumann"]
        else 1
    )
    torch.testing.assert_close(x.grad, torch.full((2, 3), 3.0 * scale))


@by_mode(BACKWARDS)
def test_a_sample_that_is_not_finite_leaves_its_batch_mates_gradients_alone(backward: Backward) -> None:
    base = problem(batch=4)
    results = []
    for bad in (0.0, float("nan"), float("inf")):
        x = base.inputs[0].clone()
        x[1] += bad
        x.requires_grad_()
        f = lambda z, x=x: base.cell(z, x, *base.inputs[1:])  # noqa: E731
        solution = fixed_point(f, base.z0, backward=backward, on_failure="ignore")
        g = torch.ones_like(solution.value)
        results.append(torch.autograd.grad(solution.value, x, g)[0][[0, 2, 3]])
    assert results[0].norm() > 0
    if isinstance(backward, StochasticJFB):  # two solves of fixed depth, whatever the values
        results = [r.round(decimals=12) for r in results]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("solver", [Anderson(ridge=0.0), Anderson(), Broyden()], ids=repr)
def test_samples_that_end_early_do_not_spoil_the_unrolled_gradient_of_the_parameters(solver: Solver) -> None:
    base = problem(batch=3)
    x = base.inputs[0].clone()
    x[0] = 0  # at its fixed point from the start, its history all zeros
    base = replace(base, inputs=(x, *base.inputs[1:])).requiring_grad()
    g = torch.randn(3, 5, dtype=torch.float64)
    found = gradients(base, Unroll(), g, solver=solver, stopping=Stopping(rtol=1e-9))
    # The first sample takes no step, hence has no gradient; the others have theirs.
    others = base.samples([1, 2]).requiring_grad()
    expected = dense_gradients(others, g[1:])[1]
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-5)


# Values, counts and the tape ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(memory=3)], ids=["picard", "anderson", "broyden"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_value_is_the_same_in_every_mode_with_and_without_gradients(
    solver: Solver, dtype: torch.dtype
) -> None:
    base = problem("mlp", dim=9, contraction=0.7, dtype=dtype)
    settings = {"solver": solver, "stopping": Stopping(rtol=3e-2 if dtype == torch.bfloat16 else 1e-5)}
    with torch.no_grad():
        reference = fixed_point(base.f, base.z0, **settings)
    base = base.requiring_grad()
    for name, backward in BACKWARDS.items():
        with torch.no_grad():
            assert torch.equal(
                fixed_point(base.f, base.z0, backward=backward, **settings).value, reference.value
            )
        if name == "stochastic":
            continue
        solution = fixed_point(base.f, base.z0, backward=backward, **settings)
        assert solution.value.requires_grad
        assert torch.equal(solution.value, reference.value), name
        assert torch.equal(solution.num_steps, reference.num_steps)
        assert torch.equal(solution.residual, reference.residual)


@by_mode(BACKWARDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_autograd_is_off(backward: Backward, mode: Any) -> None:
    base = problem().requiring_grad()
    f = Spy(base.f)
    with mode():
        solution = fixed_point(f, base.z0, backward=backward)
    assert not solution.value.requires_grad
    assert not any(f.outputs_on_tape)
    assert solution.nfe == f.count == int(solution.num_steps.max()) + 1
    assert solution.converged.all()


@pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.5)], ids=["plain", "damped"])
def test_random_depth_is_steps_off_the_tape_then_steps_on_it(solver: Solver) -> None:
    base = problem("mlp").requiring_grad()
    damping = solver.damping
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    backward = StochasticJFB(no_grad=(0, 4), grad=(1, 3), generator=generator)
    depths = set()
    for _ in range(25):
        free = int(torch.randint(0, 5, (), generator=twin))
        taped = int(torch.randint(1, 4, (), generator=twin))
        depths.add((free, taped))
        f = Spy(base.f)
        solution = fixed_point(f, base.z0, solver=solver, backward=backward)
        assert f.outputs_on_tape == [False] * free + [True] * taped
        assert solution.nfe == free + taped
        assert solution.num_steps.tolist() == [free + taped] * 3
        z = base.z0
        for step in range(free + taped):
            with torch.set_grad_enabled(step >= free):
                z = (1 - damping) * z + damping * base.f(z)
        g = torch.randn_like(z)
        torch.testing.assert_close(solution.value, z, rtol=1e-13, atol=1e-14)
        ours = torch.autograd.grad(solution.value, base.inputs, g)
        for a, b in zip(ours, torch.autograd.grad(z, base.inputs, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert len(depths) > 4
    assert min(free for free, _ in depths) == 0


def test_random_depth_is_uniform_on_its_closed_range_and_repeats_with_the_seed() -> None:
    def depths(seed: int) -> list[int]:
        backward = StochasticJFB(no_grad=(2, 2), grad=(1, 4), generator=torch.Generator().manual_seed(seed))
        x = torch.ones(1, 1, requires_grad=True)
        f = lambda z: 0.5 * z + x  # noqa: E731
        return [fixed_point(f, torch.zeros(1, 1), backward=backward).nfe - 2 for _ in range(80)]

    first = depths(1)
    assert first == depths(1)
    assert first != depths(2)
    assert {n: first.count(n) > 8 for n in set(first)} == {1: True, 2: True, 3: True, 4: True}


def test_random_depth_draws_from_pytorchs_default_generator_unless_given_one() -> None:
    x = torch.ones(1, 1, requires_grad=True)
    f = lambda z: 0.5 * z + x  # noqa: E731

    def depths() -> list[int]:
        torch.manual_seed(3)
        return [fixed_point(f, torch.zeros(1, 1), backward=StochasticJFB()).nfe for _ in range(10)]

    assert depths() == depths()
    state = torch.get_rng_state()
    fixed_point(f, torch.zeros(1, 1), backward=StochasticJFB(generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_depth_is_drawn_on_the_cpu_whatever_the_default_device() -> None:
    z0 = torch.zeros(1, 1)
    with torch.device("meta"):
        assert fixed_point(lambda z: z, z0, backward=StochasticJFB(no_grad=(1, 1), grad=(2, 2))).nfe == 3


def test_random_depth_under_no_grad_draws_nothing_and_follows_the_stopping_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with torch.no_grad():
        solution = fixed_point(
            lambda z: 0.5 * z + 1, torch.zeros(2, 2), backward=StochasticJFB(generator=generator)
        )
    assert solution.converged.all()
    assert torch.equal(generator.get_state(), state)


# Differentiating twice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("solver", "stopping"),
    [
        (Picard(), Stopping.steps(4)),
        (Anderson(memory=2), Stopping.steps(5)),
        (Broyden(memory=2), Stopping.steps(5)),
        (Anderson(), Stopping(rtol=1e-5)),
    ],
    ids=["picard", "anderson", "broyden", "tolerance"],
)
def test_unrolling_can_be_differentiated_twice(kind: str, solver: Solver, stopping: Stopping) -> None:
    base = problem(kind, batch=1, dim=2, contraction=0.6).requiring_grad()

    def value(*tensors: Tensor) -> Tensor:
        settings = {"solver": solver, "stopping": stopping, "backward": Unroll()}
        return fixed_point(base.cell, base.z0, tensors, **settings).value

    assert torch.autograd.gradgradcheck(value, base.inputs)


@by_mode(FIRST_ORDER)
def test_other_modes_refuse_to_be_differentiated_twice(backward: Backward) -> None:
    base = problem("linear").requiring_grad()  # whose second derivatives pass the fixed point alone
    value = fixed_point(base.f, base.z0, backward=backward).value

    def second_derivative() -> None:
        first = torch.autograd.grad(value.sum(), base.inputs, create_graph=True)
        torch.autograd.grad(first[1].sum(), base.inputs[1])

    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backward=Unroll\(\)"):
        second_derivative()


def test_an_adjoint_that_needs_no_products_is_applied_too() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    solution = fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3))
    source = start_of_tape(solution.value)
    tripled = attach(solution, 2 * x, lambda g, vjp: 3 * g, source, nfe=1)
    assert torch.autograd.grad(tripled.value.sum(), x)[0].tolist() == [[6.0] * 3] * 2
    assert tripled.nfe == solution.nfe + 1


@dataclass(frozen=True, kw_only=True)
class Halved(Backward):
    """A mode of a user's: it solves a map of its own with the same fixed point, and its adjoint by hand."""

    def apply(self, f: Any, z0: Tensor, solve: Any) -> Solution:
        solution = solve_off_tape(lambda z: torch.lerp(z, f(z), 0.5), z0, solve)
        source, output = on_tape(f, solution.value)

        def adjoint(g: Tensor, vjp: Any) -> Tensor:
            return solve.linear(lambda u: vjp(u) + g, g, solver=Picard(), stopping=EXACT).value

        return attach(solution, output, adjoint, source, nfe=1)


class Resumed(Picard):
    """Notes the states that it goes on from."""

    seen: ClassVar[list[Any]] = []

    def resume(self, state: Any, z0: Tensor) -> Any:
        self.seen.append(state)
        return self.init(z0)


def test_a_solve_says_itself_whether_it_is_of_the_fixed_point_or_of_a_derivative() -> None:
    base = problem(contraction=0.5).requiring_grad()
    settings = {"stopping": EXACT, "backward": Halved(), "solver": Resumed()}
    Resumed.seen.clear()
    value = fixed_point(base.f, base.z0, state="of an earlier solve", compact=True, **settings).value
    expected = dense_gradients(base, torch.ones_like(value))
    assert Resumed.seen == ["of an earlier solve"]  # the map that the mode made is solved as the caller asked
    found = torch.autograd.grad(value.sum(), base.inputs)
    assert len(Resumed.seen) == 1  # the adjoint begins afresh
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-8)


@by_mode(BACKWARDS)
def test_second_derivatives_that_do_not_pass_the_solve_are_no_concern(backward: Backward) -> None:
    base = problem().requiring_grad()
    y = torch.ones(3, requires_grad=True)
    loss = fixed_point(base.f, base.z0, backward=backward).value.sum() + y.pow(3).sum()
    (slope,) = torch.autograd.grad(loss, y, create_graph=True)
    assert torch.autograd.grad(slope.sum(), y)[0].tolist() == [6, 6, 6]


# Independence -------------------------------------------------------------------------------------------


@by_mode(BACKWARDS)
def test_two_forwards_before_one_backward_are_independent(backward: Backward) -> None:
    layer = ImplicitLayer(Cell(5), backward=backward, stopping=Stopping(rtol=1e-5))
    xs = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    apart = []
    for x in xs:
        layer.zero_grad()
        apart.append((*torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters())),))
    first, second = layer(xs[0]), layer(xs[1])
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), (*xs, *layer.parameters()))
    torch.testing.assert_close(found[:2], (apart[0][0], apart[1][0]))
    for ours, a, b in zip(found[2:], apart[0][1:], apart[1][1:], strict=True):
        torch.testing.assert_close(ours, a + b)


@by_mode({"implicit": exactly(), "unroll": Unroll()})
def test_a_layer_used_twice_in_a_model_gets_the_sum_of_both_gradients(backward: Backward) -> None:
    cell = Cell(2).double()
    layer = ImplicitLayer(cell, backward=backward, stopping=Stopping(rtol=1e-11, max_steps=200))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"cell.inner.weight": weight, "cell.inner.bias": bias}
        once = torch.func.functional_call(layer, parameters, x)
        return torch.func.functional_call(layer, parameters, once)

    assert torch.autograd.gradcheck(twice, (x, *(p.detach().requires_grad_() for p in cell.parameters())))
    layer(layer(x)).sum().backward()
    direct = torch.autograd.grad(twice(x, *cell.parameters()).sum(), tuple(cell.parameters()))
    torch.testing.assert_close(tuple(p.grad for p in cell.parameters()), direct)


@by_mode(BACKWARDS)
def test_a_second_backward_needs_retain_graph_and_then_repeats_the_first(backward: Backward) -> None:
    base = problem().requiring_grad()
    value = fixed_point(base.f, base.z0, backward=backward).value
    first = torch.autograd.grad(value.sum(), base.inputs, retain_graph=True)
    second = torch.autograd.grad(value.sum(), base.inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value.sum(), base.inputs)


# Memory -------------------------------------------------------------------------------------------------


class Box:
    """Holds a tensor that autograd saved; dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved(backward: Backward, solver: Solver, stopping: Stopping) -> tuple[Solution, list[weakref.ref], int]:
    """A solve, the boxes of what its graph saved, and their bytes."""
    base = problem("mlp").requiring_grad()
    boxes, num_bytes = [], 0

    def pack(tensor: Tensor) -> Box:
        nonlocal num_bytes
        num_bytes += tensor.nbytes
        box = Box(tensor.detach())  # with its graph it would hold the node that holds it
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        solution = fixed_point(base.f, base.z0, solver=solver, stopping=stopping, backward=backward)
    return solution, boxes, num_bytes


@by_mode(OFF_TAPE)
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=["picard", "anderson", "broyden"])
def test_memory_does_not_grow_with_the_solvers_steps(backward: Backward, solver: Solver) -> None:
    few, many = (saved(backward, solver, Stopping.steps(n)) for n in (10, 500))
    assert few[2] == many[2] > 0
    assert len(few[1]) == len(many[1])


def test_memory_of_the_neumann_form_does_not_grow_with_its_steps_and_that_of_unrolling_does() -> None:
    def measure(backward: Backward, steps: int = 10) -> int:
        return saved(backward, Picard(), Stopping.steps(steps))[2]

    neumann = [measure(PhantomGradient(steps=k, form="neumann")) for k in (1, 50)]
    unrolled = [measure(PhantomGradient(steps=k)) for k in (1, 50)]
    assert neumann[0] == neumann[1]
    assert unrolled[1] > 20 * unrolled[0]
    assert measure(Unroll(), 500) > 20 * measure(Unroll(), 10)


def test_random_depth_saves_nothing_for_its_steps_off_the_tape() -> None:
    few, many = (saved(StochasticJFB(no_grad=(n, n), grad=(2, 2)), Picard(), Stopping())[2] for n in (0, 200))
    assert few == many > 0


@by_mode(BACKWARDS)
@pytest.mark.parametrize("differentiate", [True, False], ids=["after backward", "without backward"])
def test_all_a_solve_saved_is_freed_without_the_garbage_collector(
    backward: Backward, differentiate: bool
) -> None:
    gc.collect()
    gc.disable()
    try:
        solution, boxes, _ = saved(backward, Anderson(), Stopping(rtol=1e-5))
        assert any(box() is not None for box in boxes)
        if differentiate:
            solution.value.sum().backward()
        del solution
        assert [box for box in boxes if box() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "reentrant"),
    # A reentrant checkpoint runs its forward pass under no_grad, where random depth is a plain solve.
    [*((name, False) for name in BACKWARDS), *((name, True) for name in BACKWARDS if name != "stochastic")],
)
def test_gradients_pass_a_checkpoint(name: str, reentrant: bool) -> None:
    backward = BACKWARDS[name]
    layer = ImplicitLayer(Cell(5), backward=backward, stopping=Stopping(rtol=1e-5))
    x = torch.randn(2, 5, requires_grad=True)
    wanted = (x, *layer.parameters())
    layer(x).square().sum().backward()
    expected = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for t, e in zip(wanted, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


@by_mode(BACKWARDS)
def test_gradients_pass_tensors_saved_elsewhere(backward: Backward) -> None:
    base = problem("mlp").requiring_grad()
    expected = gradients(base, backward, base.inputs[0].detach(), stopping=Stopping(rtol=1e-5))
    with torch.autograd.graph.save_on_cpu():
        found = gradients(base, backward, base.inputs[0].detach(), stopping=Stopping(rtol=1e-5))
    torch.testing.assert_close(found, expected)


# Mixed precision ----------------------------------------------------------------------------------------


@by_mode(BACKWARDS)
@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=["float32 state", "bfloat16 state"])
def test_weights_get_their_gradient_under_autocast(backward: Backward, start: torch.dtype) -> None:
    cell = Cell(8)
    layer = ImplicitLayer(cell, backward=backward, stopping=Stopping(rtol=2e-2), on_failure="ignore")
    x = torch.randn(4, 8, dtype=start)
    found = []
    for cache in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            value = layer(x)
        assert value.dtype == start
        value.float().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for with_cache, without in zip(*found, strict=True):
        assert with_cache is not None
        assert with_cache.dtype == torch.float32
        assert with_cache.norm() > 0
        assert (with_cache - without).norm() < 0.02 * without.norm()  # without, sums are in float32


@by_mode({**FIRST_ORDER, "implicit": ImplicitDifferentiation()})
def test_weights_cast_off_the_tape_are_not_used_on_it(
    backward: Backward, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch releases before 2.13 keep weights cast under no_grad, without their graph, until the cache
    # is cleared; newer ones would pass the test above without.
    events: list[str] = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (events.append("clear"), clear()))
    inner = nn.Linear(8, 8)

    def cell(z: Tensor) -> Tensor:
        events.append("tape" if torch.is_grad_enabled() else "free")
        return 0.5 * inner(z)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        fixed_point(cell, torch.zeros(4, 8), backward=backward, on_failure="ignore")
    last_free, first_tape = len(events) - events[::-1].index("free") - 1, events.index("tape")
    assert "clear" in events[last_free:first_tape]


@by_mode({"implicit": exactly(), "jfb": JFB(), "stochastic": StochasticJFB(no_grad=(20, 20), grad=(9, 9))})
def test_gradients_under_autocast_are_close_to_those_in_full_precision(backward: Backward) -> None:
    cell = Cell(8)
    # Picard: steps of the others beyond what half precision can resolve are made of its rounding errors.
    layer = ImplicitLayer(
        cell, solver=Picard(), backward=backward, stopping=Stopping(rtol=1e-2), on_failure="ignore"
    )
    x = torch.randn(4, 8)
    found = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        layer.zero_grad()
        with context:
            value = layer(x)
        value.sum().backward()
        found.append(cell.inner.weight.grad)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


@by_mode(BACKWARDS)
def test_a_bfloat16_cell_works_without_autocast(backward: Backward) -> None:
    layer = ImplicitLayer(Cell(8).bfloat16(), backward=backward, stopping=Stopping(rtol=3e-2))
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    value = layer(x)
    assert value.dtype == torch.bfloat16
    value.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in layer.parameters())


# Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PhantomGradient(steps=0), ValueError, "PhantomGradient: steps must be at least 1, got 0"),
        (lambda: PhantomGradient(damping=0.0), ValueError, "PhantomGradient: damping"),
        (lambda: PhantomGradient(form="series"), ValueError, r"form must be one of .*got 'series'"),
        (lambda: StochasticJFB(no_grad=(3, 2)), ValueError, r"no_grad must be \(least, most\), got \(3, 2\)"),
        (lambda: StochasticJFB(no_grad=(-1, 2)), ValueError, r"no_grad\[0\] must be at least 0, got -1"),
        (lambda: StochasticJFB(grad=(0, 2)), ValueError, r"grad\[0\] must be at least 1, got 0"),
        (lambda: StochasticJFB(grad=[1, 2]), TypeError, "grad must be a tuple"),
        (lambda: StochasticJFB(grad=3.5), TypeError, "grad must be a tuple"),
        (lambda: StochasticJFB(grad=(1.0, 2)), TypeError, r"grad\[0\] must be an int"),
        (lambda: ImplicitDifferentiation(solver="anderson"), TypeError, "solver must be a deqlib solver"),
        (lambda: ImplicitDifferentiation(solver=Anderson), TypeError, "solver must be a deqlib solver"),
        (lambda: ImplicitDifferentiation(stopping=1e-3), TypeError, "stopping must be a deqlib.Stopping"),
        (lambda: ImplicitDifferentiation(rtol=1e-3), TypeError, "rtol"),
        (
            lambda: ImplicitDifferentiation(warm_start=True),
            TypeError,
            r"warm_start must be a deqlib.AdjointStart",
        ),
        (lambda: JFB(steps=2), TypeError, "steps"),
        (lambda: Unroll(True), TypeError, "positional"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("mode", [JFB(), PhantomGradient(form="neumann"), ImplicitDifferentiation()])
def test_a_solve_of_nothing_that_requires_gradient_requires_none(mode: Backward) -> None:
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), backward=mode)
    assert not solution.value.requires_grad
    scale = torch.tensor(0.5, requires_grad=True)
    solution = fixed_point(lambda z: scale * z + 1, torch.zeros(2, 3), backward=mode)
    assert solution.value.requires_grad

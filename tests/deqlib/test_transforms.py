"""Derivatives of every order and every transform of `torch.func`, against loops that autograd unrolls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from problems import KINDS, TIGHT, Cell, Problem, Spy, made, problem, problems
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from deqlib import (
    JFB,
    Anderson,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    NonConvergenceWarning,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solver,
    Status,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)

EXACT = Stopping(rtol=TIGHT, max_steps=300, patience=None)
TOKENS, WIDTH = 3, 2


def attention(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Self-attention over three tokens, a contraction for the weights below; z and x (B, 6), w (2, 6)."""
    tokens = z.unflatten(1, (TOKENS, WIDTH))
    q, k, v = (tokens @ w).split(WIDTH, 2)
    mixed = torch.softmax(q @ k.mT / WIDTH**0.5, 2) @ v
    return torch.tanh(x + 0.5 * mixed.flatten(1))


def make(kind: str) -> Problem:
    if kind != "attention":
        return problem(kind, batch=2, dim=3, contraction=0.6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS * WIDTH, generator=generator, dtype=torch.float64)
    w = 0.5 * torch.randn(WIDTH, 3 * WIDTH, generator=generator, dtype=torch.float64)
    return made(attention, x, w)


ALL = (*KINDS, "attention")


def implicit(base: Problem, **settings: Any) -> Callable[..., Tensor]:
    """The fixed point as a function of the tensors of the problem, captured by closure."""

    def value(*tensors: Tensor) -> Tensor:
        found: Tensor = fixed_point(
            lambda z: base.cell(z, *tensors),
            base.z0,
            **{"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT), **settings},
            on_failure="ignore",
        ).value
        return found

    return value


def unrolled(base: Problem, steps: int = 150) -> Callable[..., Tensor]:
    """The same by a loop."""

    def value(*tensors: Tensor) -> Tensor:
        z = base.z0
        for _ in range(steps):
            z = base.cell(z, *tensors)
        return z

    return value


def close(ours: Any, expected: Any, tolerance: float = 1e-9) -> None:
    ours, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (ours, expected))
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-6)


def loss(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: (value(*tensors).sin() * value(*tensors).new_tensor([1.0, -2.0])[:, None]).sum()


def all_of(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def stacked(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, 0.5 * t, -t], 1) for t in tensors)


Value = Callable[..., Tensor]
TRANSFORMS: dict[str, Callable[[Value, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, t: grad(loss(f), all_of(t))(*t),
    "vjp": lambda f, t: vjp(f, *t)[1](t[0]),
    "jvp": lambda f, t: jvp(f, t, tuple(torch.cos(a) for a in t)),
    "jacrev": lambda f, t: jacrev(f, all_of(t))(*t),
    "jacfwd": lambda f, t: jacfwd(f, all_of(t))(*t),
    "hessian": lambda f, t: hessian(loss(f), all_of(t))(*t),
    "jacrev of jacfwd": lambda f, t: jacrev(jacfwd(f, 1), 0)(*t),
    "jvp of jvp": lambda f, t: jvp(lambda a: jvp(f, t, (a, *t[1:]))[1], t[:1], t[:1])[1],
    "jvp of grad": lambda f, t: jvp(grad(loss(f)), t, t)[1],
    "grad of grad": lambda f, t: grad(lambda *a: grad(loss(f))(*a).pow(2).sum(), all_of(t))(*t),
    "third derivative": lambda f, t: grad(
        lambda a: grad(lambda b: grad(loss(f))(b, *t[1:]).pow(2).sum())(a).pow(2).sum()
    )(t[0]),
    "vmap over inputs": lambda f, t: vmap(f, (1, *(None for _ in t[1:])))(stacked(t)[0], *t[1:]),
    "vmap over parameters": lambda f, t: vmap(f, (None, *(1 for _ in t[1:])))(t[0], *stacked(t)[1:]),
    "vmap of vmap": lambda f, t: vmap(lambda a: vmap(lambda b: f(a, b, *t[2:]), 1)(stacked(t)[1]), 1)(
        stacked(t)[0]
    ),
    "gradients of each": lambda f, t: vmap(grad(loss(f), all_of(t)), (1, *(None for _ in t[1:])))(
        stacked(t)[0], *t[1:]
    ),
    "gradient of all": lambda f, t: grad(lambda *a: vmap(loss(f), 1)(*a).sum(), all_of(t))(*stacked(t)),
    "hessian of each": lambda f, t: vmap(hessian(loss(f)), 1)(*stacked(t)),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_unrolling_gives(name: str, kind: str) -> None:
    base = make(kind)
    transform = TRANSFORMS[name]
    close(transform(implicit(base), base.inputs), transform(unrolled(base), base.inputs))


# Fast: along a random direction. Else entry by entry, which is exhaustive and takes many times as long.
fast_or_not = pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])


@fast_or_not
@pytest.mark.parametrize("kind", ALL)
def test_gradcheck_and_gradgradcheck_pass_in_reverse_and_in_forward_mode(kind: str, fast: bool) -> None:
    base = make(kind).requiring_grad()
    value = implicit(base)
    assert torch.autograd.gradcheck(value, base.inputs, check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(value, base.inputs, check_fwd_over_rev=True, fast_mode=fast)


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(memory=12)], ids=["picard", "anderson", "broyden"]
)
def test_any_solver_solves_the_problems_of_the_derivatives(solver: Solver) -> None:
    base = make("mlp")
    backward = ImplicitDifferentiation(solver=solver, stopping=EXACT)
    found = hessian(loss(implicit(base, solver=solver, backward=backward)), (0, 1))(*base.inputs)
    close(found, hessian(loss(unrolled(base)), (0, 1))(*base.inputs))


@given(base=problems(dtype=torch.float64, max_contraction=0.8))
def test_forward_and_reverse_mode_are_transposes(base: Problem) -> None:
    value = implicit(base)
    tangents = tuple(torch.randn_like(t) for t in base.inputs)
    u = torch.randn_like(base.z0)
    _, pushed = jvp(value, base.inputs, tangents)
    pulled = vjp(value, *base.inputs)[1](u)
    torch.testing.assert_close(
        (u * pushed).sum(),
        sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True)),
        rtol=1e-8,
        atol=1e-10,
    )


# What derivatives are taken of --------------------------------------------------------------------------


def test_inputs_parameters_and_captured_tensors_have_the_same_derivatives() -> None:
    cell = Cell(3).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    settings = {"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT)}
    layer = ImplicitLayer(cell, **settings)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def by_layer(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, x).sin().sum()

    def by_arguments(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        def f(z: Tensor, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
            return torch.tanh(z @ weights["cell.inner.weight"].T + weights["cell.inner.bias"] + x)

        return fixed_point(f, torch.zeros_like(x), (x, parameters), **settings).value.sin().sum()

    def by_loop(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            z = torch.tanh(z @ parameters["cell.inner.weight"].T + parameters["cell.inner.bias"] + x)
        return z.sin().sum()

    for transform in (grad, hessian):
        expected = transform(by_loop, (0, 1))(x, parameters)
        close(transform(by_layer, (0, 1))(x, parameters), expected)
        close(transform(by_arguments, (0, 1))(x, parameters), expected)


def test_parameters_put_back_before_the_backward_pass_do_not_mislead_it() -> None:
    layer = ImplicitLayer(Cell(3), stopping=Stopping(rtol=1e-6))
    x = torch.randn(2, 3)
    swapped = {name: (0.7 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    value = functional_call(layer, swapped, x)
    slopes = torch.autograd.grad(value.sum(), tuple(swapped.values()), create_graph=True)
    second = torch.autograd.grad(sum(s.square().sum() for s in slopes), tuple(swapped.values()))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(swapped[name])
    own = tuple(layer.parameters())
    expected = torch.autograd.grad(layer(x).sum(), own, create_graph=True)
    close(slopes, expected, 1e-3)
    close(second, torch.autograd.grad(sum(s.square().sum() for s in expected), own), 1e-2)


def test_an_ensemble_of_layers_is_a_vmap_over_their_parameters() -> None:
    layers = [ImplicitLayer(Cell(3), stopping=Stopping(rtol=1e-6)) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(5, 3)
    together = vmap(lambda p, x: functional_call(layers[0], p, x), (0, None))(parameters, x)
    for one, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(one, layer(x), rtol=1e-4, atol=1e-5)


def test_a_pytree_state_has_second_derivatives() -> None:
    base = make("tanh")

    def value(x: Tensor, w: Tensor) -> Tensor:
        def cell(state: dict[str, Tensor]) -> dict[str, Tensor]:
            image = base.cell(torch.cat([state["a"], state["b"].flatten(1)], 1), x, w)
            return {"a": image[:, :1], "b": image[:, 1:].unflatten(1, (2, 1))}

        z0 = {"a": torch.zeros(2, 1, dtype=torch.float64), "b": torch.zeros(2, 2, 1, dtype=torch.float64)}
        found = fixed_point(cell, z0, stopping=EXACT, backward=ImplicitDifferentiation(stopping=EXACT)).value
        return torch.cat([found["a"], found["b"].flatten(1)], 1)

    close(hessian(loss(value), (0, 1))(*base.inputs), hessian(loss(unrolled(base)), (0, 1))(*base.inputs))


def test_a_transform_inside_leaves_the_outer_graph_whole() -> None:
    base = make("tanh").requiring_grad()
    x, w = base.inputs
    batch = torch.stack([x.detach(), 0.5 * x.detach()])
    results = [
        torch.autograd.grad(vmap(grad(loss(f)), (0, None))(batch, w).square().sum(), w)
        for f in (implicit(base), unrolled(base))
    ]
    close(*results)


class Scaled(torch.autograd.Function):
    """scale * z, with rules of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, scale: Tensor) -> Tensor:
        return scale * z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, scale = ctx.saved_tensors
        return g * scale, (g * z).sum(0)


@pytest.mark.parametrize(
    "transform",
    [grad, lambda f, places: jacrev(jacrev(f, places), places), lambda f, _: lambda *t: jvp(f, t, t)[1]],
    ids=["grad", "jacrev of jacrev", "jvp"],  # the cell itself has no forward mode
)
def test_a_cell_may_hold_functions_with_rules_of_their_own(transform: Any) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    scale = torch.full((3,), 0.4, dtype=torch.float64)
    settings = {"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT)}

    def value(x: Tensor, scale: Tensor) -> Tensor:
        return fixed_point(lambda z: Scaled.apply(z, scale).sin() + x, x * 0, **settings).value.sin().sum()

    def loop(x: Tensor, scale: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            z = (scale * z).sin() + x
        return z.sin().sum()

    close(transform(value, (0, 1))(x, scale), transform(loop, (0, 1))(x, scale))


def test_nested_layers_have_second_derivatives() -> None:
    w, v = (0.4 * torch.randn(2, 2, dtype=torch.float64) for _ in range(2))
    x = torch.randn(1, 2, dtype=torch.float64)
    settings = {"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT)}

    def nested(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        def outer(z: Tensor) -> Tensor:
            inner = fixed_point(lambda y: torch.tanh(y @ v + 0.5 * z), torch.zeros_like(x), **settings).value
            return torch.tanh(inner @ w + x)

        return fixed_point(outer, torch.zeros_like(x), **settings).value

    def loops(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        z = y = torch.zeros_like(x)
        for _ in range(150):  # both to their fixed point together
            y = torch.tanh(y @ v + 0.5 * z)
            z = torch.tanh(y @ w + x)
        return z

    tensors = (x, w, v)
    close(nested(*tensors), loops(*tensors))
    close(*(grad(lambda *t, f=f: f(*t).sin().sum(), (0, 1, 2))(*tensors) for f in (nested, loops)))
    close(*(hessian(lambda *t, f=f: f(*t).sin().sum(), (0, 1, 2))(*tensors) for f in (nested, loops)))
    required = tuple(t.requires_grad_() for t in tensors)
    # Along a random direction: entry by entry they were compared with those of the loops.
    assert torch.autograd.gradcheck(nested, required, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(nested, required, fast_mode=True)


@pytest.mark.parametrize("history", [0, 100])  # nodes of a graph are numbered, thread by thread
def test_what_other_threads_do_has_a_second_derivative(history: int) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(history):
        x + x

    settings = {"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT)}
    with ThreadPoolExecutor(1) as pool:
        z0 = torch.zeros_like(x)
        value = fixed_point(lambda z: pool.submit(lambda: z * w).result() + x, z0, **settings).value
    (slope,) = torch.autograd.grad(value.sum(), w, create_graph=True)
    torch.testing.assert_close(slope, (x / (1 - w).square()).sum(0))
    (second,) = torch.autograd.grad(slope.sum(), w)
    torch.testing.assert_close(second, (2 * x / (1 - w) ** 3).sum(0))


# What is returned, and what it costs --------------------------------------------------------------------


def test_a_solution_under_vmap_tells_of_every_solve() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    rates = torch.tensor([0.1, 0.5, 0.8, 1.5], dtype=torch.float64)

    def solve(rate: Tensor, x: Tensor) -> Any:
        found = fixed_point(
            lambda z: rate * torch.sin(z) + x,
            torch.zeros_like(x),
            solver=Picard(),
            stopping=Stopping(rtol=1e-6, max_steps=25),
            on_failure="ignore",
        )
        return found.value, found.residual, found.num_steps, found.status, found.trace

    value, residual, num_steps, status, trace = vmap(solve)(rates, x)
    for i in range(4):
        alone = solve(rates[i], x[i])
        torch.testing.assert_close(value[i], alone[0])
        torch.testing.assert_close(residual[i], alone[1])
        assert torch.equal(num_steps[i], alone[2])
        assert torch.equal(status[i], alone[3])
        shared = min(len(trace[i]), len(alone[4]))
        torch.testing.assert_close(trace[i, :shared], alone[4][:shared])
    assert (status[:2] == Status.CONVERGED).all()


def test_an_earlier_state_is_refused_under_a_transform() -> None:
    x = torch.randn(2, 3)
    found = fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"^state: .*torch\.func"):
        grad(lambda x: fixed_point(lambda z: 0.5 * z + x, found.value, state=found.state).value.sum())(x)


def test_a_failed_solve_under_a_transform_is_reported() -> None:
    stopping = Stopping(rtol=1e-9, max_steps=3)

    def solve(x: Tensor, on_failure: Any) -> Tensor:
        settings = {"stopping": stopping, "on_failure": on_failure}
        return fixed_point(lambda z: 0.9 * torch.sin(z) + x, torch.zeros_like(x), **settings).value

    x = torch.randn(4, 2, 3)
    with pytest.warns(NonConvergenceWarning, match=r"fixed-point solve of .*: 8 of 8 samples did not"):
        vmap(lambda x: solve(x, "warn"))(x)
    with pytest.raises(NonConvergenceError):
        grad(lambda x: solve(x, "raise").sum())(x[0])


def test_a_failed_adjoint_of_the_second_order_is_reported() -> None:
    base = make("tanh").requiring_grad()
    backward = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-9, max_steps=2))
    value = fixed_point(base.f, base.z0, stopping=EXACT, backward=backward).value
    with pytest.warns(NonConvergenceWarning, match="adjoint solve"):
        torch.autograd.grad(value.sum(), base.inputs, create_graph=True)


def test_a_plain_backward_pass_evaluates_the_cell_no_more() -> None:
    base = make("mlp").requiring_grad()
    f = Spy(base.f)
    solution = fixed_point(f, base.z0)
    assert f.count == solution.nfe == int(solution.num_steps.max()) + 2
    torch.autograd.grad(solution.value.sum(), base.inputs, retain_graph=True)
    assert f.count == solution.nfe
    torch.autograd.grad(solution.value.sum(), base.inputs, create_graph=True)
    assert f.count == solution.nfe


def test_second_derivatives_see_the_cell_under_the_autocast_of_the_forward_pass() -> None:
    inner, seen = nn.Linear(4, 4), []
    x = torch.randn(2, 4, requires_grad=True)

    def cell(z: Tensor) -> Tensor:
        image = inner(z)
        seen.append(image.dtype)
        return 0.5 * torch.tanh(image).float() + x

    stopping = Stopping(rtol=1e-2)
    settings = {"stopping": stopping, "backward": ImplicitDifferentiation(stopping=stopping)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixed_point(cell, torch.zeros(2, 4), **settings).value
    (slope,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    torch.autograd.grad(slope.square().sum(), (x, *inner.parameters()))
    assert set(seen) == {torch.bfloat16}


# The other modes ----------------------------------------------------------------------------------------

PASSING: dict[str, Backward] = {
    "jfb": JFB(),
    "phantom": PhantomGradient(steps=3),
    "stochastic": StochasticJFB(no_grad=(3, 3), grad=(2, 2)),
    "unroll": Unroll(),
}


@pytest.mark.parametrize("name", PASSING)
def test_first_derivatives_of_other_modes_are_theirs_under_transforms_too(name: str) -> None:
    base = make("mlp").requiring_grad()
    value = implicit(base, backward=PASSING[name], solver=Picard(), stopping=Stopping(rtol=1e-6))
    expected = torch.autograd.grad(loss(value)(*base.inputs), base.inputs)
    plain = tuple(t.detach() for t in base.inputs)
    close(grad(loss(value), all_of(plain))(*plain), expected)
    directional = sum((a * b).sum() for a, b in zip(expected, plain, strict=True))
    close(jvp(loss(value), plain, plain)[1], directional)
    if name in ("jfb", "phantom"):
        each = vmap(grad(loss(value), all_of(plain)), (0, None, None))(plain[0][None], *plain[1:])
        close([t[0] for t in each], expected)


@pytest.mark.parametrize("name", ["jfb", "phantom", "stochastic"])
@pytest.mark.parametrize(
    "twice",
    [
        lambda f, x: grad(lambda x: grad(lambda x: f(x).sum())(x).sum())(x),
        lambda f, x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,)),
        lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
        lambda f, x: jvp(grad(lambda x: f(x).sum()), (x,), (x,)),
    ],
    ids=["grad of grad", "jvp of jvp", "grad of jvp", "jvp of grad"],
)
def test_second_derivatives_of_modes_that_have_none_are_refused(name: str, twice: Any) -> None:
    base = make("tanh")
    value = implicit(base, backward=PASSING[name], solver=Picard(), stopping=Stopping(rtol=1e-6))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        twice(lambda x: value(x, base.inputs[1]), base.inputs[0])


@pytest.mark.parametrize(
    ("backward", "solver"),
    [
        (PhantomGradient(form="neumann"), Anderson()),
        (SharedInverse(), Broyden()),
        (Reversible(), ReversiblePicard()),
    ],
    ids=["neumann", "shared inverse", "reversible"],
)
def test_modes_that_need_a_recorded_graph_say_so_under_transforms(backward: Backward, solver: Solver) -> None:
    base = make("tanh")
    value = implicit(base, backward=backward, solver=solver, stopping=Stopping(rtol=1e-8))
    with pytest.raises(RuntimeError, match=r"torch\.func.*use backward=ImplicitDifferentiation\(\)"):
        grad(loss(value))(*base.inputs)
    with torch.no_grad():
        close(vmap(value, (0, None))(base.inputs[0][None], base.inputs[1])[0], value(*base.inputs))


@pytest.mark.parametrize("backward", [ImplicitDifferentiation(), JFB(), PhantomGradient(form="neumann")])
def test_gradients_batched_the_old_way_are_refused(backward: Backward) -> None:
    base = make("tanh").requiring_grad()
    value = fixed_point(base.f, base.z0, backward=backward).value
    with pytest.raises(RuntimeError, match=r"use torch\.func\.jacrev"):
        torch.autograd.grad(
            value, base.inputs, torch.ones(4, *value.shape, dtype=value.dtype), is_grads_batched=True
        )


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians_and_hessians_are_refused_by_name(strategy: str) -> None:
    base = make("tanh")
    value = implicit(base)
    with pytest.raises(RuntimeError, match=r"vectorize=True; use torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(value, base.inputs, vectorize=True, strategy=strategy)
    with pytest.raises(RuntimeError, match=r"vectorize=True; use torch\.func\.jacrev"):
        torch.autograd.functional.hessian(loss(value), base.inputs, vectorize=True)

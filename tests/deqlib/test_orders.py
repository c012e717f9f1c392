"""Derivatives of cells that hold what `torch.func` refuses, against loops that autograd unrolls.

Where plain PyTorch differentiates twice, so does the layer, and to the same numbers.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import TIGHT, problems
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from deqlib import (
    Anderson,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceWarning,
    Picard,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.nn import Dropout, one_solve
from deqlib.testing import Problem
from deqlib.testing import problems as testing

EXACT = Stopping(rtol=TIGHT, max_steps=300, patience=None)
SETTINGS = {"stopping": EXACT, "backward": ImplicitDifferentiation(stopping=EXACT), "on_failure": "ignore"}
DIM = 4

Cell = Callable[[Tensor, Tensor], Tensor]


class Tanh(torch.autograd.Function):
    """A function of the old kind, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - torch.tanh(x) ** 2)


class Weighted(torch.autograd.Function):
    """The same of z * w + x, which no PyTorch function is given."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return z * w + x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, w = ctx.saved_tensors
        return g * w, (g * z).sum(0), g


def linear(norm: float = 0.5) -> nn.Linear:
    layer = nn.Linear(DIM, DIM).double()
    nn.init.orthogonal_(layer.weight, norm)
    return layer


def with_hook() -> Cell:
    inner = linear()
    inner.register_full_backward_hook(lambda *_: None)
    return lambda z, x: torch.tanh(inner(z) + x)


def with_checkpoint() -> Cell:
    inner = linear()
    block = lambda z, x: torch.tanh(inner(z) + x)  # noqa: E731
    return lambda z, x: checkpoint(block, z, x, use_reentrant=False)


def with_function() -> Cell:
    inner = linear()
    return lambda z, x: Tanh.apply(inner(z) + x)


def with_hidden_tensors() -> Cell:
    w = nn.Parameter(torch.linspace(-0.5, 0.5, DIM, dtype=torch.float64))
    return lambda z, x: torch.sin(Weighted.apply(z, w, x))


def with_batch_norm() -> Cell:
    inner, norm = linear(), nn.BatchNorm1d(DIM).double()
    return lambda z, x: torch.tanh(0.3 * norm(inner(z) + 2 * x) + x)


def with_sparse() -> Cell:
    inner, matrix = linear(), (torch.eye(3) * 0.8).double().to_sparse_csr()
    return lambda z, x: torch.tanh(torch.sparse.mm(matrix, inner(z)) + x)


def energy(w: Tensor) -> Callable[..., Tensor]:
    return lambda z, x: (0.5 * (z - x) ** 2).sum() + torch.log(torch.cosh(z @ w)).sum()


def with_inner_gradient() -> Cell:
    e = energy(nn.Parameter(0.2 * torch.randn(DIM, DIM, dtype=torch.float64)))
    return lambda z, x: z - 0.3 * torch.func.grad(e)(z, x)


def with_inner_gradient_of_a_closure() -> Cell:
    e = energy(nn.Parameter(0.2 * torch.randn(DIM, DIM, dtype=torch.float64)))
    return lambda z, x: z - 0.3 * torch.func.grad(lambda z: e(z, x))(z)


def with_threads() -> Cell:
    inner, pool = linear(), ThreadPoolExecutor(1)
    return lambda z, x: torch.tanh(pool.submit(inner, z).result() + x)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear().weight.detach())

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight


def with_traced_code() -> Cell:
    inner = torch.jit.trace(Traced(), torch.zeros(3, DIM, dtype=torch.float64))
    return lambda z, x: torch.tanh(inner(z) + x)


def with_parametrization() -> Cell:
    inner = parametrizations.weight_norm(linear())
    return lambda z, x: torch.tanh(inner(z) + x)


def with_shared_weights() -> Cell:
    inner = linear()
    return lambda z, x: torch.tanh(inner(torch.tanh(inner(z)) + x) @ inner.weight)


def with_dropout() -> Cell:
    inner, drop = linear(0.4), Dropout(0.4)
    return lambda z, x: torch.tanh(drop(inner(z)) + x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = linear(0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(z) + x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lin = ImplicitLayer(Inner(), **SETTINGS), linear(0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.lin(z) + x))


class Unrolled(nn.Module):
    """`Outer` with a loop in place of the inner layer."""

    def __init__(self, outer: Outer) -> None:
        super().__init__()
        self.outer = outer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(loop(self.outer.inner.cell)(self.outer.lin(z) + x))


def loop(cell: Cell, steps: int = 70) -> Callable[[Tensor], Tensor]:
    def value(x: Tensor) -> Tensor:
        with one_solve():
            z = torch.zeros_like(x)
            for _ in range(steps):
                z = cell(z, x)
        return z

    return value


def layer(cell: Cell, **settings: Any) -> Callable[[Tensor], Tensor]:
    return ImplicitLayer(cell, **{**SETTINGS, **settings})


def parameters_of(cell: Any) -> list[Tensor]:
    """Those that the cell refers to by closure, or as a module."""
    if isinstance(cell, nn.Module):
        return list(cell.parameters())
    found: list[Tensor] = []
    for kept in (part.cell_contents for part in cell.__closure__ or ()):
        if isinstance(kept, nn.Module):
            found.extend(kept.parameters())
        elif isinstance(kept, nn.Parameter):
            found.append(kept)
        elif callable(kept) and getattr(kept, "__closure__", None):
            found.extend(parameters_of(kept))
    return found


CELLS: dict[str, Callable[[], Cell]] = {
    "full backward hook": with_hook,
    "checkpoint": with_checkpoint,
    "function of the old kind": with_function,
    "tensors given to a function only": with_hidden_tensors,
    "batch norm in training": with_batch_norm,
    "sparse csr": with_sparse,
    "torch.func.grad of arguments": with_inner_gradient,
    "torch.func.grad of a closure": with_inner_gradient_of_a_closure,
    "other threads": with_threads,
    "traced code": with_traced_code,
    "parametrization": with_parametrization,
    "shared weights": with_shared_weights,
}


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, DIM, generator=generator, dtype=torch.float64).requires_grad_()


def derivatives(value: Callable[[Tensor], Tensor], wanted: list[Tensor], orders: int) -> list[Tensor]:
    """Gradients of orders 1 to `orders`, each of a sum of sines of the last; the input is no leaf."""
    x = 1.3 * wanted[0]
    total, found = (value(x) * torch.linspace(1, 2, DIM, dtype=x.dtype)).sin().sum(), []
    for _ in range(orders):
        new = torch.autograd.grad(total, [x, *wanted], create_graph=True, allow_unused=True)
        found += [torch.zeros_like(t) if g is None else g for g, t in zip(new, [x, *wanted], strict=True)]
        total = sum(g.sin().sum() for g in new if g is not None)
    return [tensor.detach() for tensor in found]


def assert_same(ours: Any, expected: Any, tolerance: float = 1e-6) -> None:
    ours, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (ours, expected))
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Sparse CSR")
@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives_are_those_of_the_unrolled_loop(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]()
    wanted = [data(), *parameters_of(cell)]
    assert_same(derivatives(layer(cell), wanted, 2), derivatives(loop(cell), wanted, 2))


@pytest.mark.parametrize(
    "name", ["function of the old kind", "torch.func.grad of arguments", "shared weights"]
)
def test_third_derivatives_too(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]()
    wanted = [data(), *parameters_of(cell)]
    assert_same(derivatives(layer(cell), wanted, 3), derivatives(loop(cell), wanted, 3))


@given(base=problems(dtype=torch.float64, max_contraction=0.7), orders=st.just(2))
def test_second_derivatives_of_random_maps(base: Problem, orders: int) -> None:
    base = base.requiring_grad()
    tensors = list(base.inputs)

    def both(value: Callable[..., Tensor]) -> list[Tensor]:
        total, found = value().sin().sum(), []
        for _ in range(orders):
            new = torch.autograd.grad(total, tensors, create_graph=True)
            found += [g.detach() for g in new]
            total = sum((g.sin() + g.square()).sum() for g in new)
        return found

    def unrolled() -> Tensor:
        z = base.z0
        for _ in range(120):
            z = base.f(z)
        return z

    assert_same(both(lambda: fixed_point(base.f, base.z0, **SETTINGS).value), both(unrolled), 1e-6)


def test_a_mask_of_a_solve_is_that_of_its_derivatives() -> None:
    torch.manual_seed(0)
    cell = with_dropout()
    wanted = [data(), *parameters_of(cell)]
    with one_solve():
        results = [derivatives(value, wanted, 2) for value in (layer(cell), loop(cell))]
    assert_same(*results)


def test_random_numbers_that_the_evaluation_drew_are_not_drawn_anew() -> None:
    torch.manual_seed(0)
    inner, x, masks = linear(), data(), []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        masks.append(torch.rand_like(z).round())
        return torch.tanh(inner(z) * masks[-1] + x)

    settings = {**SETTINGS, "stopping": Stopping.steps(5)}
    value = ImplicitLayer(cell, solver=Picard(), **settings)(x)
    ours = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
    drawn = len(masks)
    torch.autograd.grad(ours[0].sum(), x)
    assert len(masks) == drawn


def test_a_layer_in_a_layer_is_differentiated_to_any_order_and_under_transforms() -> None:
    torch.manual_seed(0)
    cell = Outer()
    ours, expected = layer(cell), loop(Unrolled(cell), 40)
    wanted = [data(), *cell.parameters()]
    assert_same(derivatives(ours, wanted, 2), derivatives(expected, wanted, 2))
    x = data().detach()
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sin().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.vjp(f, x)[1](x.cos()),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.hessian(lambda x: f(x).sin().sum())(x),
        lambda f: torch.vmap(lambda x: f(x[None])[0])(x),
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x[None]).sin().sum()))(x),
    ):
        assert_same(transform(ours), transform(expected))


@pytest.mark.parametrize("name", ["torch.func.grad of arguments", "torch.func.grad of a closure"])
def test_gradients_inside_the_cell_under_transforms(name: str) -> None:
    torch.manual_seed(0)
    cell, x = CELLS[name](), data().detach()
    ours, expected = layer(cell), loop(cell)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sin().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.hessian(lambda x: f(x).sin().sum())(x),
        lambda f: torch.vmap(lambda x: f(x[None])[0])(x),
    ):
        assert_same(transform(ours), transform(expected))


# Whose parameters are swapped ---------------------------------------------------------------------------


class Net(nn.Module):
    """Solves with a function that refers to the module."""

    def __init__(self, by_loop: bool = False) -> None:
        super().__init__()
        self.lin, self.by_loop = linear(), by_loop

    def forward(self, x: Tensor) -> Tensor:
        if self.by_loop:
            return loop(lambda z, x: torch.tanh(self.lin(z) + x))(x)
        return fixed_point(lambda z: torch.tanh(self.lin(z) + x), torch.zeros_like(x), **SETTINGS).value


def nets() -> tuple[Net, Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    net, other = Net(), Net(by_loop=True)
    other.load_state_dict(net.state_dict())
    return net, other, {name: (0.8 * p).detach() for name, p in net.named_parameters()}


def test_functional_call_around_a_function_that_refers_to_the_module() -> None:
    net, other, p = nets()
    x = data().detach()
    for transform in (
        lambda f: torch.func.grad(lambda p: f(p, x).sin().sum())(p),
        lambda f: torch.vmap(torch.func.grad(lambda p, x: f(p, x[None]).sin().sum()), (None, 0))(p, x),
        lambda f: torch.func.hessian(lambda p: f(p, x).sin().sum())(p),
        lambda f: torch.func.jvp(lambda p: f(p, x), (p,), (p,))[1],
        lambda f: torch.vmap(f, (0, None))({name: torch.stack([t, -t]) for name, t in p.items()}, x),
    ):
        assert_same(*(transform(lambda p, x, m=m: functional_call(m, p, (x,))) for m in (net, other)))


def test_an_inner_step_of_training_is_differentiated_through() -> None:
    net, other, _ = nets()
    x, results = data().detach(), []
    for model in (net, other):
        slow = dict(model.named_parameters())
        value = functional_call(model, slow, (x,)).square().sum()
        steps = torch.autograd.grad(value, list(slow.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(slow.items(), steps, strict=True)}
        outer = functional_call(model, fast, (x,)).sin().sum()
        results.append(torch.autograd.grad(outer, list(slow.values())))
    assert_same(*results)


def test_what_is_hidden_from_everything_is_refused_and_not_missed() -> None:
    net = Net()
    table = {"net": [net]}
    hidden = type("Hidden", (), {"__slots__": ("key",), "__call__": lambda self, z: table["net"][0].lin(z)})()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return fixed_point(lambda z: hidden(z) + x, torch.zeros_like(x)).value

    model, x = Model(), data().detach()
    swapped = {name: (0.7 * p).detach() for name, p in model.named_parameters()}
    with pytest.raises(
        RuntimeError, match=r"^the cell used a parameter of shape \(4, 4\).*the module itself as"
    ):
        torch.func.grad(lambda p: functional_call(model, p, x).sum())(swapped)


# What else goes with a second derivative ----------------------------------------------------------------


def test_a_step_with_a_gradient_penalty_is_that_of_the_loop() -> None:
    results = []
    for by_loop in (False, True):
        torch.manual_seed(0)
        cell, head = Inner(), linear(1.0)
        value = loop(cell) if by_loop else layer(cell, solver=Anderson(), compact=True)
        x = data()
        out = head(value(x)).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        (out + slope.square().sum()).backward()
        results.append([x.grad, *(p.grad for p in [*cell.parameters(), *head.parameters()])])
    assert_same(*results)


def test_a_hessian_vector_product_leaves_the_graph_for_others() -> None:
    torch.manual_seed(0)
    cell = with_function()
    x = data()
    (slope,) = torch.autograd.grad(layer(cell)(x).sin().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(loop(cell)(x).sin().sum(), x, create_graph=True)
    for v in torch.eye(3 * DIM, dtype=x.dtype)[:3].view(3, 3, DIM):
        products = [torch.autograd.grad(s, x, v, retain_graph=True) for s in (slope, expected)]
        assert_same(*products)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_hooks_of_tensors_see_what_they_see_without_a_layer() -> None:
    torch.manual_seed(0)
    cell, results = Inner(), []
    for value in (layer(cell), loop(cell)):
        x, calls = 2 * data(), []
        x.retain_grad()
        handle = cell.lin.weight.register_hook(lambda g, calls=calls: calls.append(1) or 3 * g)
        for p in cell.parameters():
            p.grad = None
        value(x).sin().sum().backward(create_graph=True)
        results.append([x.grad.detach(), *(p.grad.detach() for p in cell.parameters())])
        handle.remove()
        assert calls
    assert_same(*results)


def test_a_tree_of_states_and_inputs_made_from_one_another() -> None:
    torch.manual_seed(0)
    inner, x = linear(), data()

    def step(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tanh(inner(torch.cat([a, b], 1)) + x * y)
        return both[:, :1], both[:, 1:]

    def ours(x: Tensor) -> Tensor:
        z0 = {"a": torch.zeros_like(x[:, :1]), "b": torch.zeros_like(x[:, 1:])}

        def cell(z: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return dict(zip("ab", step(z["a"], z["b"], x, y), strict=True))

        found = fixed_point(cell, z0, (x, x.sin()), **SETTINGS).value
        return torch.cat([found["a"], found["b"]], 1)

    def expected(x: Tensor) -> Tensor:
        a, b = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, 1:])
        for _ in range(60):
            a, b = step(a, b, x, x.sin())
        return torch.cat([a, b], 1)

    wanted = [x, *inner.parameters()]
    assert_same(derivatives(ours, wanted, 2), derivatives(expected, wanted, 2))


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives_in_half_precision_are_near(autocast: bool) -> None:
    torch.manual_seed(0)
    kind = torch.float32 if autocast else torch.bfloat16
    cell = Inner().to(kind)
    stopping = Stopping(rtol=1e-2)
    settings = {"stopping": stopping, "backward": ImplicitDifferentiation(stopping=stopping)}
    results = []
    for value in (layer(cell, **settings), loop(cell, 20)):
        x = data().detach().to(kind).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            z = value(x)
        (slope,) = torch.autograd.grad(z.float().square().sum(), x, create_graph=True)
        second = torch.autograd.grad(slope.square().sum(), [x, *cell.parameters()])
        results.append([t.float() for t in second])
    assert_same(*results, tolerance=0.1)


def test_many_gradients_at_once_of_a_graph_made_outside() -> None:
    torch.manual_seed(0)
    cell, results = Inner(), []
    for value in (layer(cell), loop(cell)):
        x = data()
        y = value(x)
        rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        pull = lambda v, record, x=x, y=y: torch.autograd.grad(  # noqa: E731
            y, x, v, create_graph=record, retain_graph=True
        )[0]
        plain = torch.vmap(lambda v, pull=pull: pull(v, False))(rows)
        recorded = torch.vmap(lambda v, pull=pull: pull(v, True))(rows)
        second = torch.autograd.grad(recorded.sin().sum(), [x, *cell.parameters()])
        results.append([plain, recorded.detach(), *second])
    assert_same(*results)


def test_a_failed_adjoint_of_a_second_derivative_warns() -> None:
    x = data()
    backward = ImplicitDifferentiation(solver=Picard(), stopping=Stopping(rtol=1e-10, max_steps=3))
    value = layer(with_function(), backward=backward, on_failure="warn")(x)
    with pytest.warns(NonConvergenceWarning, match="adjoint solve"):
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.warns(NonConvergenceWarning, match="adjoint solve"):
        slope.sum().backward()


def test_the_graph_of_a_second_derivative_goes_with_its_last_reference() -> None:
    class Token:
        pass

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.token = Token()
            tokens.append(weakref.ref(ctx.token))
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g.sin()

    tokens: list[weakref.ref[Token]] = []
    inner, x = linear(), data()
    cell = layer(lambda z, x: torch.tanh(inner(Kept.apply(z)) + x))
    gc.disable()
    try:
        (slope,) = torch.autograd.grad(cell(x).sum(), x, create_graph=True)
        slope.sum().backward()
        del slope
        (slope,) = torch.autograd.grad(cell(x).sum(), x, create_graph=True)
        slope.register_hook(stop)
        with pytest.raises(RuntimeError, match="stop here"):
            slope.sum().backward()
        del slope
        assert [token() for token in tokens] == [None] * len(tokens) != []
    finally:
        gc.enable()


def stop(_: Tensor) -> None:
    raise RuntimeError("stop here")


def test_a_recorded_backward_pass_evaluates_the_cell_no_more() -> None:
    calls, x, inner = [], data(), linear()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(inner(z) + x)

    solution = ImplicitLayer(cell).solve(x)
    assert len(calls) == solution.nfe
    (slope,) = torch.autograd.grad(solution.value.sum(), x, create_graph=True)
    slope.sum().backward()
    assert len(calls) == solution.nfe


def test_unrolling_is_differentiated_twice_whatever_the_cell_holds() -> None:
    torch.manual_seed(0)
    cell = with_function()
    wanted = [data(), *parameters_of(cell)]
    ours = layer(cell, backward=Unroll(), solver=Picard(), stopping=Stopping.steps(70))
    assert_same(derivatives(ours, wanted, 2), derivatives(loop(cell), wanted, 2))


def in_a_dict(e: Callable[..., Tensor], kept: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return lambda z: z - 0.3 * torch.func.grad(lambda z, x: e(z, x))(z, kept["x"])


@pytest.mark.parametrize(
    "cell_of",
    [
        lambda e, y: lambda z: z - 0.3 * torch.func.grad(e)(z, y),
        lambda e, y: lambda z: z - 0.3 * torch.func.grad(lambda y: -e(y, z) + 0.2 * (z * y).sum())(y),
        lambda e, y: lambda z: 0.5 * torch.vmap(lambda z, y: torch.tanh(z) + y.sin())(z, y),
        lambda e, y: in_a_dict(e, {"x": y}),
    ],
    ids=["as an argument", "differentiated in the cell", "through vmap", "in a dict"],
)
def test_captured_tensors_that_transforms_in_the_cell_are_given(cell_of: Any) -> None:
    torch.manual_seed(0)
    e, y = energy(nn.Parameter(0.2 * torch.randn(DIM, DIM, dtype=torch.float64))), data().detach()

    def ours(y: Tensor) -> Tensor:
        return fixed_point(cell_of(e, y), torch.zeros_like(y), **SETTINGS).value

    def expected(y: Tensor) -> Tensor:
        cell, z = cell_of(e, y), torch.zeros_like(y)
        for _ in range(90):
            z = cell(z)
        return z

    for transform in (
        lambda f: torch.func.grad(lambda y: f(y).sin().sum())(y),
        lambda f: torch.func.jvp(f, (y,), (y.cos(),))[1],
        lambda f: torch.func.hessian(lambda y: f(y).sin().sum())(y),
    ):
        assert_same(transform(ours), transform(expected))


def test_what_a_cell_keeps_is_put_back_where_it_fails() -> None:
    net, x = Net(), data().detach()
    weight, y = net.lin.weight, x.clone()

    def cell(z: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("not here")
        return net.lin(z) + y

    closure = inspect.getclosurevars(cell).nonlocals
    with pytest.raises(ValueError, match="not here"):
        torch.func.grad(lambda x: fixed_point(lambda z: cell(z) + x, torch.zeros_like(x)).value.sum())(x)
    assert net.lin.weight is weight
    assert closure["y"] is y
    assert closure == inspect.getclosurevars(cell).nonlocals


def test_dropout_under_vmap_draws_one_mask_or_says_what_to_do() -> None:
    torch.manual_seed(0)
    solve, x = layer(with_dropout()), data().detach()
    each = torch.vmap(lambda x: solve(x[None])[0], randomness="same")(x)
    assert each.shape == x.shape
    for randomness in ("different", "error"):
        with pytest.raises(RuntimeError, match=r'^Dropout: .*randomness="same"'):
            torch.vmap(lambda x: solve(x[None])[0], randomness=randomness)(x)


PROBLEMS = {
    problem.name: problem
    for problem in (
        testing.linear([0.5, 0.3, -0.4], batch=2, non_normality=0.5, dtype=torch.float64),
        testing.tanh_rnn(batch=2, width=4, rate=0.6, dtype=torch.float64),
        testing.mlp(batch=2, tokens=3, width=4, gain=0.7, dtype=torch.float64),
        testing.mixer(batch=2, tokens=3, width=4, gain=0.5, dtype=torch.float64),
        testing.transformer(batch=2, tokens=3, width=4, heads=2, gain=0.7, dtype=torch.float64),
        testing.convolution(batch=2, channels=2, side=3, gain=0.7, dtype=torch.float64),
    )
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_second_derivatives_of_the_problems_with_known_solutions(name: str) -> None:
    base = PROBLEMS[name].requiring_grad()

    def unrolled() -> Tensor:
        z = base.z0
        for _ in range(400):
            z, last = base.f(z), z
            if (z - last).norm() <= 1e-14 * z.norm():
                break
        return z

    results = []
    for value in (fixed_point(base.f, base.z0, **SETTINGS).value, unrolled()):
        slopes = torch.autograd.grad(value.sin().sum(), base.inputs, create_graph=True)
        second = torch.autograd.grad(sum(s.sin().sum() for s in slopes), base.inputs)
        results.append([*(s.detach() for s in slopes), *second])
    assert_same(*results)


def test_what_a_cell_writes_to_itself_under_a_transform_stays() -> None:
    seen: list[Tensor] = []
    x = data().detach()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        seen.append(torch.zeros(()))
        return torch.tanh(0.5 * z + x)

    torch.func.grad(lambda x: layer(cell)(x).sum())(x)
    before = len(seen)
    torch.func.grad(lambda x: layer(cell)(x).sum())(x)
    assert 0 < before < len(seen)

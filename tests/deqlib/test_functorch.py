"""The package `functorch`, which PyTorch ships beside `torch.func`, with a layer inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TIGHT
from torch import Tensor, nn

from deqlib import ImplicitDifferentiation, ImplicitLayer, Stopping

functorch = pytest.importorskip("functorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # it is deprecated, and says so
    pytest.mark.filterwarnings("ignore::UserWarning:functorch"),
]

EXACT = Stopping(rtol=TIGHT, max_steps=200, patience=None)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4).double()
        nn.init.orthogonal_(self.lin.weight, 0.5)
        self.register_buffer("scale", torch.full((4,), 0.9, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.lin(z) + x)


class Loop(nn.Module):
    """The layer by a loop; its parameters have the same names."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = self.cell(z, x)
        return z


def pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    cell = Cell()
    return ImplicitLayer(cell, stopping=EXACT, backward=ImplicitDifferentiation(stopping=EXACT)), Loop(cell)


DATA = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(transform: Callable[[nn.Module], Any]) -> None:
    """The same with the layer as with the loop."""
    ours, expected = (torch.utils._pytree.tree_leaves(transform(module)) for module in pair())
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: functorch.grad(lambda x: f(x).sin().sum())(x),
    "vmap": lambda f, x: functorch.vmap(lambda x: f(x[None]))(x),
    "jvp": lambda f, x: functorch.jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f, x: functorch.vjp(f, x)[1](x.cos()),
    "jacrev": lambda f, x: functorch.jacrev(f)(x),
    "jacfwd": lambda f, x: functorch.jacfwd(f)(x),
    "hessian": lambda f, x: functorch.hessian(lambda x: f(x).sin().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_inputs(name: str) -> None:
    check(lambda module: TRANSFORMS[name](module, DATA))


PARAMETERS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "value": lambda f, p: f(p),
    "grad": lambda f, p: functorch.grad(lambda p: f(p).sin().sum())(p),
    "jvp": lambda f, p: functorch.jvp(f, (p,), (p,)),
    "vjp": lambda f, p: functorch.vjp(f, p)[1](DATA),
    "jacrev": lambda f, p: functorch.jacrev(f)(p),
    "jacfwd": lambda f, p: functorch.jacfwd(f)(p),
    "hessian": lambda f, p: functorch.hessian(lambda p: f(p).sin().sum())(p),
    "vmap": lambda f, p: functorch.vmap(f)(tuple(torch.stack([t, 0.5 * t]) for t in p)),
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", PARAMETERS)
def test_transforms_of_parameters(name: str, buffers: bool) -> None:
    def transform(module: nn.Module) -> Any:
        if buffers:
            function, parameters, kept = functorch.make_functional_with_buffers(module)
            f = lambda p: function(p, kept, DATA)  # noqa: E731
        else:
            function, parameters = functorch.make_functional(Frozen(module))
            f = lambda p: function(p, DATA)  # noqa: E731
        return PARAMETERS[name](f, tuple(p.detach() for p in parameters))

    check(transform)


class Frozen(nn.Module):
    """A module without buffers: `make_functional` refuses them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        cell: Any = module.cell
        del cell.scale
        cell.scale = 0.9
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_per_sample_gradients() -> None:
    def transform(module: nn.Module) -> Any:
        function, parameters, buffers = functorch.make_functional_with_buffers(module)
        each = functorch.grad(lambda p, x: function(p, buffers, x[None]).sin().sum())
        return functorch.vmap(each, in_dims=(None, 0))(tuple(p.detach() for p in parameters), DATA)

    check(transform)


def test_gradients_of_the_original_parameters_by_plain_autograd() -> None:
    def transform(module: nn.Module) -> Any:
        function, parameters, buffers = functorch.make_functional_with_buffers(module)
        total = function(parameters, buffers, DATA).sin().sum()
        slopes = torch.autograd.grad(total, parameters, create_graph=True)
        second = torch.autograd.grad(sum(s.square().sum() for s in slopes), parameters)
        return [*(s.detach() for s in slopes), *second]

    check(transform)


def test_an_ensemble() -> None:
    layers, loops = zip(*(pair(seed) for seed in range(3)), strict=True)
    results = []
    for modules in (layers, loops):
        function, parameters, buffers = functorch.combine_state_for_ensemble(modules)
        f = functorch.vmap(function, in_dims=(0, 0, None))
        slopes = functorch.grad(lambda p, f=f, b=buffers: f(p, b, DATA).sin().sum())(
            tuple(p.detach() for p in parameters)
        )
        results.append([f(parameters, buffers, DATA).detach(), *slopes])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

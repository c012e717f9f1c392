"""Cells that take gradients inside: a solve that nobody records keeps nothing of what they recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solver,
    Stopping,
    Unroll,
    fixed_point,
)

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.9),
    "anderson": Anderson(memory=3),
    "broyden": Broyden(memory=3),
    "newton": NewtonKrylov(memory=3),
    "gmres": GMRES(memory=3),
    "reversible": ReversiblePicard(damping=0.5),
    "auto": Auto(methods=(Anderson(memory=3),)),
}
WIDTH = 6
WEIGHT = torch.nn.Parameter(0.3 * torch.linalg.qr(torch.randn(WIDTH, WIDTH).double())[0])


def slope(z: Tensor, x: Tensor, *, guard: str) -> Tensor:
    """One step of gradient descent on an energy, its gradient taken inside."""
    with torch.enable_grad():
        if guard == "usual":
            z = z if z.requires_grad else z.requires_grad_()
        elif guard == "always":
            z = z.requires_grad_()
        else:
            z = z.detach().requires_grad_()
        energy = 0.5 * (z - x).square().sum() + torch.log(torch.cosh(z @ WEIGHT)).sum()
        (gradient,) = torch.autograd.grad(energy, z, create_graph=True)
        return z - 0.3 * gradient


def recorded(z: Tensor, x: Tensor, **_: Any) -> Tensor:
    """A map that records though nobody asked."""
    with torch.enable_grad():
        return torch.tanh(z @ WEIGHT + x)


def plain(z: Any, cell: Callable[..., Tensor], x: Tensor) -> Tensor:
    return cell(z, x)


def as_tree(z: Any, cell: Callable[..., Tensor], x: Tensor) -> Any:
    image = cell(torch.cat([z["a"], z["b"][0].unsqueeze(1)], 1), x)
    return {"a": image[:, :-1], "b": (image[:, -1],)}


class Alive:
    """Counts what autograd has saved and is still held."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Alive:
        self.hooks = saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        box = type("Box", (), {})()
        box.tensor = tensor.detach()  # a result would keep its node, and that the box
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(box, self._drop)
        return box

    def _drop(self) -> None:
        self.now -= 1


def most_alive(steps: int, solve: Callable[[Stopping], Any], rule: Callable[[int], Stopping]) -> int:
    with Alive() as alive:
        kept = solve(rule(steps))
        assert alive.most > 0
        del kept
    return alive.most


RULES = {
    "fixed": Stopping.steps,
    "measured": lambda n: Stopping.steps(n, measure=True),
    "to a tolerance": lambda n: Stopping(rtol=1e-30, max_steps=n, patience=None),
}


@pytest.mark.parametrize("state", [plain, as_tree], ids=["tensor", "tree"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cell", [slope, recorded])
@pytest.mark.parametrize("name", SOLVERS)
def test_memory_does_not_grow_with_steps_without_gradient(
    name: str, cell: Callable[..., Tensor], rule: str, state: Any
) -> None:
    x = torch.randn(3, WIDTH).double()
    start = torch.zeros_like(x)
    z0 = start if state is plain else {"a": start[:, :-1], "b": (start[:, -1],)}

    def solve(stopping: Stopping) -> Any:
        with torch.no_grad():
            return fixed_point(
                lambda z, x: state(z, lambda z, x: cell(z, x, guard="always"), x),
                z0,
                (x,),
                solver=SOLVERS[name],
                stopping=stopping,
                on_failure="ignore",
            )

    few, many = (most_alive(steps, solve, RULES[rule]) for steps in (6, 24))
    assert many <= few
    found = solve(Stopping.steps(3))
    tensors = [found.value] if state is plain else [found.value["a"], *found.value["b"]]
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)


MODES: dict[str, tuple[Solver, Backward]] = {
    "implicit": (Picard(), ImplicitDifferentiation(stopping=Stopping(rtol=1e-10, max_steps=200))),
    "jfb": (Picard(), JFB()),
    "phantom": (Picard(), PhantomGradient(steps=2)),
    "neumann": (Picard(), PhantomGradient(steps=2, form="neumann")),
    "shared": (Broyden(), SharedInverse()),
    "reversible": (ReversiblePicard(damping=0.5), Reversible()),
}


@pytest.mark.parametrize("guard", ["usual", "always", "own"])
@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_with_steps_in_modes_that_promise_it(mode: str, guard: str) -> None:
    solver, backward = MODES[mode]
    x = torch.randn(3, WIDTH).double().requires_grad_()

    def solve(stopping: Stopping) -> Any:
        return fixed_point(
            lambda z, x: slope(z, x, guard=guard),
            torch.zeros_like(x),
            (x,),
            solver=solver,
            stopping=stopping,
            backward=backward,
            on_failure="ignore",
        )

    few, many = (most_alive(steps, solve, RULES["to a tolerance"]) for steps in (6, 24))
    assert many <= few


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"gmres"}))
@pytest.mark.parametrize("guard", ["usual", "always", "own"])
def test_the_usual_guards_work_and_never_flag_the_state_of_the_solve(
    name: str, guard: str, compact: bool
) -> None:
    x = torch.randn(4, WIDTH).double() * torch.tensor([[1e-3], [1.0], [10.0], [100.0]]).double()
    z0 = torch.zeros_like(x)
    with torch.no_grad():
        found = fixed_point(
            lambda z, x: slope(z, x, guard=guard),
            z0,
            (x,),
            solver=SOLVERS[name],
            stopping=Stopping(rtol=1e-6, max_steps=200),
            compact=compact,
            on_failure="raise",
        )
    assert not z0.requires_grad
    assert not found.value.requires_grad
    with torch.no_grad():
        expected = torch.zeros_like(x)
        for _ in range(400):
            expected = slope(expected.clone(), x, guard="own").detach()
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guard", ["usual", "always"])
@pytest.mark.parametrize("backward", [Unroll(), Unroll(checkpoint=True), MODES["implicit"][1]])
def test_first_gradients_of_such_cells_are_those_of_plain_unrolling(backward: Backward, guard: str) -> None:
    x = torch.randn(3, WIDTH).double()
    rule = Stopping(rtol=1e-12, max_steps=300)
    gradients = []
    for unrolled in (False, True):
        leaf = x.clone().requires_grad_()
        if unrolled:
            z = torch.zeros_like(x)
            for _ in range(120):
                z = slope(z, leaf, guard="usual")
        else:
            z = fixed_point(
                lambda z, x: slope(z, x, guard=guard),
                torch.zeros_like(x),
                (leaf,),
                solver=Picard(),
                stopping=rule,
                backward=backward,
            ).value
        gradients.append(torch.autograd.grad(z.square().sum(), (leaf, WEIGHT)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


def test_a_product_in_forward_mode_is_not_lost_where_a_cell_records() -> None:
    """`detach` takes tangents off too, and with them the products that Newton's method asks for."""
    x = torch.randn(3, WIDTH).double()
    exact = NewtonKrylov(memory=4, derivative="jvp")
    rule = Stopping(rtol=1e-8, max_steps=60)
    with torch.no_grad():
        found, plainly = (
            fixed_point(cell, torch.zeros_like(x), (x,), solver=exact, stopping=rule, on_failure="raise")
            for cell in (recorded, lambda z, x: torch.tanh(z @ WEIGHT + x))
        )
    torch.testing.assert_close(found.value, plainly.value)
    assert found.nfe == plainly.nfe
    assert not found.value.requires_grad


def test_a_tangent_is_not_lost_where_a_cell_records() -> None:
    """`detach` takes tangents off too, which forward mode sends through a solve that nobody records."""
    x, tangent = torch.randn(2, 3, WIDTH).double()
    found = []
    for cell in (recorded, lambda z, x: torch.tanh(z @ WEIGHT + x)):
        with torch.no_grad(), forward_ad.dual_level():
            value = fixed_point(
                cell,
                torch.zeros_like(x),
                (forward_ad.make_dual(x, tangent),),
                solver=Picard(),
                stopping=Stopping.steps(4),
                backward=Unroll(),
            ).value
            found.append(forward_ad.unpack_dual(value))
    assert found[0].tangent is not None
    torch.testing.assert_close(found[0].tangent, found[1].tangent)
    torch.testing.assert_close(found[0].primal, found[1].primal)


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_products_in_forward_mode(rule: str) -> None:
    x = torch.randn(3, WIDTH).double()

    def solve(stopping: Stopping) -> Any:
        exact = NewtonKrylov(memory=3, derivative="jvp")
        with torch.no_grad():
            return fixed_point(
                recorded, torch.zeros_like(x), (x,), solver=exact, stopping=stopping, on_failure="ignore"
            )

    few, many = (most_alive(steps, solve, RULES[rule]) for steps in (6, 24))
    assert many <= few


class _Plain(torch.autograd.Function):
    """Without a rule for transforms."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 0.5 * z

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 0.5 * gradients[0]


def test_a_cell_that_has_no_product_in_forward_mode_is_told_of_another_solver() -> None:
    x = torch.ones(2, 3)
    call = {"stopping": Stopping(rtol=1e-6), "on_failure": "ignore"}
    cell = lambda z, x: torch.tanh(_Plain.apply(z)) + x  # noqa: E731
    with pytest.raises(RuntimeError, match=r"derivative='jvp'.*setup_context.*derivative='difference'"):
        fixed_point(cell, torch.zeros_like(x), (x,), solver=NewtonKrylov(derivative="jvp"), **call)
    assert fixed_point(cell, torch.zeros_like(x), (x,), solver=NewtonKrylov(), **call).converged.all()

"""Nothing of a solve outlives its use, and a long training loop holds no more than a short one.

The garbage collector is off in all of these: what only it could free would pile up on a device.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    PhantomGradient,
    Picard,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
)

DIM = 6
MODES: dict[str, Callable[[], Backward]] = {
    "implicit": ImplicitDifferentiation,
    "jfb": JFB,
    "phantom unroll": lambda: PhantomGradient(steps=2),
    "phantom neumann": lambda: PhantomGradient(steps=2, form="neumann"),
    "stochastic": lambda: StochasticJFB(no_grad=(1, 2), grad=(1, 2), generator=torch.Generator()),
    "unroll": Unroll,
}
by_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Token:
    """Lives as long as the graph of one evaluation."""


class Probe(torch.autograd.Function):
    """Identity whose place in a graph holds a token."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, token: Token) -> Tensor:
        ctx.token = token
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Cell(nn.Module):
    """Remembers weakly its graphs and the tensors that every evaluation was given and made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.inner.weight, gain=0.6)
        self.refs: list[weakref.ref[Any]] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        token = Token()
        output = Probe.apply(torch.tanh(self.inner(z) + x), token)
        self.refs += [weakref.ref(thing) for thing in (z, output, token)]
        return output

    @property
    def num_alive(self) -> int:
        """How many of those still are."""
        self.refs = [ref for ref in self.refs if ref() is not None]
        return len(self.refs)


def make_layer(mode: str, **settings: Any) -> ImplicitLayer:
    solver: Solver = Picard() if mode in ("unroll", "stochastic") else Auto()
    return ImplicitLayer(Cell(), **{"solver": solver, "backward": MODES[mode](), **settings})


def live_tensors() -> tuple[int, int]:
    """Number of tensors that Python knows of and bytes of their storages; `Cell.refs` are for the rest."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


# One step.


@by_mode
def test_a_forward_that_nobody_differentiates_leaves_nothing(mode: str) -> None:
    layer = make_layer(mode)
    z = layer(torch.randn(3, DIM, requires_grad=True))
    assert layer.cell.num_alive > 0
    del z
    assert layer.cell.num_alive == 0


@by_mode
def test_a_backward_pass_leaves_nothing(mode: str) -> None:
    layer = make_layer(mode)
    layer(torch.randn(3, DIM, requires_grad=True)).sum().backward()
    assert layer.cell.num_alive == 0


@by_mode
def test_a_forward_without_gradient_leaves_nothing(mode: str) -> None:
    layer = make_layer(mode)
    with torch.no_grad():
        z = layer(torch.randn(3, DIM))
    assert layer.cell.num_alive == 0
    del z


@by_mode
def test_a_detached_solution_keeps_no_graph(mode: str) -> None:
    """A value off the graph and the measures, not the solver's state, which may hold iterates."""
    layer = make_layer(mode)
    solution = layer.solve(torch.randn(3, DIM))
    kept = solution.value.detach(), solution.trace, solution.residual, solution.num_steps
    del solution
    assert layer.cell.num_alive == 0
    del kept


def test_an_error_in_the_adjoint_frees_all_once_it_is_handled() -> None:
    backward = ImplicitDifferentiation(stopping=Stopping(rtol=1e-12, max_steps=1))
    layer = make_layer("implicit", backward=backward, on_failure="raise")
    for _ in range(3):
        z = layer(torch.randn(3, DIM))
        failed = False
        try:
            z.sum().backward()
        except NonConvergenceError:  # the context manager of pytest would keep the frames
            failed = True
        assert failed
        del z
    assert layer.cell.num_alive == 0


@by_mode
def test_an_error_of_the_cell_frees_all_once_it_is_handled(mode: str) -> None:
    layer = make_layer(mode)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("of the cell")

    layer.cell.register_forward_hook(fail)
    with contextlib.suppress(LookupError):
        layer(torch.randn(3, DIM, requires_grad=True))
    assert calls >= 2
    assert layer.cell.num_alive == 0


# Many steps.

LOOKS = (10, 100, 1000)


def check_flat(step: Callable[[int], None], layer: ImplicitLayer) -> None:
    """The same tensors, bytes and graphs after 10, 100 and 1,000 steps."""
    found = []
    for number in range(1, LOOKS[-1] + 1):
        step(number)
        if number in LOOKS:
            found.append((*live_tensors(), layer.cell.num_alive))
    assert found[0] == found[1] == found[2], f"tensors, bytes, of the cell: {found}"


CHEAP = Stopping.steps(2)  # the loops are long, not the solves


def make_cheap(mode: str, solver: Solver) -> ImplicitLayer:
    backward = ImplicitDifferentiation(solver=solver, stopping=CHEAP) if mode == "implicit" else MODES[mode]()
    return make_layer(mode, solver=solver, backward=backward, stopping=CHEAP, on_failure="ignore")


@by_mode
def test_a_long_training_loop_holds_no_more_than_a_short_one(mode: str) -> None:
    layer = make_cheap(mode, Picard())
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9)
    x, y = torch.randn(2, 4, DIM)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        (layer(x) - y).square().mean().backward()
        optimizer.step()

    check_flat(step, layer)


def test_a_long_loop_of_solves_to_a_tolerance_holds_no_more_than_a_short_one() -> None:
    layer = make_layer(
        "implicit", solver=Anderson(memory=2), stopping=Stopping(rtol=0.1), on_failure="ignore"
    )
    layer.backward = ImplicitDifferentiation(solver=Anderson(memory=2), stopping=Stopping(rtol=0.1))
    x = torch.randn(4, DIM)

    def step(number: int) -> None:
        layer.zero_grad(set_to_none=False)
        layer(x).sum().backward()

    check_flat(step, layer)


@pytest.mark.parametrize("solver", [Anderson(memory=2), Broyden(memory=2)], ids=["anderson", "broyden"])
def test_a_chain_of_warm_starts_holds_the_last_step_only(solver: Solver) -> None:
    layer = make_cheap("implicit", solver)
    x, y = torch.randn(2, 4, DIM)
    kept: dict[str, Any] = {"z0": None, "state": None}

    def step(number: int) -> None:
        layer.zero_grad(set_to_none=False)
        solution = layer.solve(x + 0.1 * (-1) ** number, **kept)
        (solution.value - y).square().mean().backward()
        kept.update(z0=solution.value, state=solution.state)  # not detached: the solve does that

    check_flat(step, layer)


def test_a_chain_of_unrolled_solves_is_cut_by_detaching_its_start() -> None:
    layer = make_cheap("unroll", Picard())
    x = torch.randn(4, DIM)
    kept: dict[str, Any] = {"z0": None}

    def step(number: int) -> None:
        layer.zero_grad(set_to_none=False)
        value = layer.solve(x + 0.5 * (-1) ** number, **kept).value
        value.sum().add(0.0 * layer.cell.inner.bias.sum()).backward()
        kept["z0"] = value.detach()

    check_flat(step, layer)

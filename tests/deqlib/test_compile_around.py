"""What a compiler does with a solve that it cannot look into: around transforms, whole steps, adjoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqlib import (
    JFB,
    Anderson,
    Backward,
    ImplicitDifferentiation,
    ImplicitLayer,
    NonConvergenceError,
    PhantomGradient,
    Picard,
    SharedInverse,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib import nn as deqnn
from deqlib._compiler import is_cell_compiled
from deqlib._torch import compiler_in_force

# What PyTorch's compiler says to itself where it goes on with a tensor that was computed.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

TIGHT = Stopping(rtol=1e-6)
FIXED = Stopping.steps(6)
MODES: dict[str, Backward] = {
    "implicit": ImplicitDifferentiation(stopping=TIGHT),
    "jfb": JFB(),
    "phantom": PhantomGradient(steps=2),
    "unroll": Unroll(),
}
# Graphs of the cell: without a tape, and with one, at a state that is a constant and at one that is none.
CELLS = {"implicit": 2, "jfb": 2, "phantom": 3, "unroll": 2}
by_mode = pytest.mark.parametrize("mode", MODES)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        nn.init.orthogonal_(self.inner.weight, 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class BreakingCell(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        image = super().forward(z, x)
        torch._dynamo.graph_break()
        return 0.9 * image


class MaskedCell(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.drop = deqnn.Dropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.drop(self.inner(z)) + x)


class NestedCell(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ImplicitLayer(Cell(), stopping=TIGHT, backward=MODES["implicit"])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.layer(0.5 * self.inner(z) + x))


class Model(nn.Module):
    def __init__(self, cell: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        settings = {"stopping": TIGHT, "backward": MODES["implicit"], **settings}
        self.stem = nn.Linear(5, 5)
        self.layer = ImplicitLayer(cell, **settings)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.layer(self.stem(x))))
        return out


class Counting:
    """A backend that counts the graphs it is given, all of them and those with the operation of the cell."""

    def __init__(self) -> None:
        self.graphs = self.cells = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        self.cells += any(node.target in (torch.tanh, "tanh") for node in module.graph.nodes)
        return module.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    from deqlib import _eager

    torch.manual_seed(0)
    torch.compiler.reset()
    _eager._tell_of_transform.cache_clear()
    yield
    assert compiler_in_force() is None
    assert not is_cell_compiled()


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and gradients by a backward pass outside of what may be compiled."""
    torch.manual_seed(1)  # of masks
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def transforms(run: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Any]]:
    """Functions of a batch that transform `run`."""
    f = torch.func
    return {
        "vmap": torch.vmap(lambda x: run(x[None])),
        "jvp": lambda x: f.jvp(run, (x,), (x,))[1],
        "vjp": lambda x: f.vjp(run, x)[1](run(x))[0],
        "grad": f.grad(lambda x: run(x).square().sum()),
        "jacrev": f.jacrev(lambda x: run(x).sum(0)),
        "jacfwd": f.jacfwd(lambda x: run(x).sum(0)),
        "gradients of samples": torch.vmap(f.grad(lambda x: run(x[None]).square().sum())),
        "hessian": f.hessian(lambda x: run(x).square().sum()),
    }


QUICK = ("vmap", "jvp", "grad", "gradients of samples")


@by_mode
@pytest.mark.parametrize("stopping", [FIXED, TIGHT], ids=["steps", "tolerance"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in transforms(torch.sin)]
)
def test_a_transform_of_a_solve_may_be_compiled(
    name: str, stopping: Stopping, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    if mode == "unroll" and stopping is TIGHT and name in ("vmap", "gradients of samples"):
        pytest.skip("not possible without a compiler either")
    if mode in ("jfb", "phantom") and name == "hessian":
        pytest.skip("refuse a second derivative")
    model = Model(Cell(), solver=Picard(), stopping=stopping, backward=MODES[mode])
    # Within: tensors that were made inside of the transform reach modules before and after the solve.
    run = transforms(lambda x: model(2 * x).sin())[name]
    x = torch.randn(2, 5)
    compiled = torch.compile(run, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-5, atol=1e-5)
    said = [record.getMessage() for record in caplog.records if record.name == "deqlib"]
    assert len(said) == (0 if mode == "unroll" and stopping is FIXED else 1)
    assert all("runs as it is" in message for message in said)


def test_a_parameter_is_differentiated_by_a_compiled_transform() -> None:
    layer = ImplicitLayer(Cell(), stopping=TIGHT, backward=MODES["implicit"])
    x = torch.randn(2, 5)
    grad = torch.func.grad(lambda x, shift: layer(x + shift).sum(), argnums=1)
    shift = torch.randn(5)
    found = torch.compile(grad, backend="aot_eager")(x, shift)
    torch.testing.assert_close(found, grad(x, shift))


@by_mode
def test_a_compiled_model_may_be_transformed(mode: str) -> None:
    model = Model(Cell(), stopping=TIGHT, backward=MODES[mode])
    x = torch.randn(2, 5)

    def grad(run: Callable[[Tensor], Tensor]) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: run(x).square().sum())(x)
        return found

    compiled = torch.compile(model.layer, backend="eager")
    torch.testing.assert_close(grad(compiled), grad(model.layer))


def test_forward_mode_may_be_compiled() -> None:
    layer = ImplicitLayer(Cell(), stopping=TIGHT, backward=MODES["implicit"])

    def tangent(x: Tensor) -> Tensor | None:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent

    x = torch.randn(2, 5)
    torch.testing.assert_close(torch.compile(tangent, backend="eager")(x), tangent(x))


def test_a_graph_that_must_not_break_says_what_to_do() -> None:
    model = Model(Cell())
    with pytest.raises(Exception, match=r"deqlib: .*Stopping\.steps\(n\)"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 5))
    grad = torch.func.grad(lambda x: model(x).sum())
    with pytest.raises(Exception, match=r"deqlib: .*backward=Unroll\(\)"):
        torch.compile(grad, backend="eager", fullgraph=True)(torch.randn(2, 5))


@by_mode
def test_the_cell_of_a_solve_to_a_tolerance_is_compiled_with_the_model(mode: str) -> None:
    evaluations = []
    cell = Cell()
    cell.register_forward_pre_hook(lambda *_: evaluations.append(torch.compiler.is_compiling()))
    model, backend = Model(cell, backward=MODES[mode]), Counting()
    compiled, counts = torch.compile(model, backend=backend), []
    for _ in range(3):
        x = torch.randn(3, 5)
        for found, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        counts.append((backend.graphs, backend.cells))
    assert counts == [(2 + CELLS[mode], CELLS[mode])] * 3


@pytest.mark.parametrize(
    ("cell", "cells"),
    [(BreakingCell, 2), (MaskedCell, 3), (NestedCell, 4)],  # a mask is drawn once: a graph of its own
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_cells_of_all_kinds_are_compiled_with_the_model(cell: type[Cell], cells: int) -> None:
    model, backend = Model(cell()), Counting()
    compiled, counts = torch.compile(model, backend=backend), []
    for _ in range(2):
        x = torch.randn(3, 5)
        for found, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts.append(backend.cells)
    assert counts[0] == counts[1]
    assert counts[0] >= cells


@pytest.mark.parametrize("settings", [{"dynamic": True}, {}], ids=["dynamic", "sizes"])
def test_other_batches_need_no_more_than_one_graph_more(settings: dict[str, Any]) -> None:
    model, backend = Model(Cell(), compact=True), Counting()
    compiled, counts = torch.compile(model, backend=backend, **settings), []
    for batch in (6, 5, 9, 7):
        x = torch.randn(batch, 5)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        counts.append(backend.cells)
    assert counts[1] == counts[2] == counts[3] <= 5  # each of two for a size, for any, and for a batch of one


def training(wrap: Callable[..., Any], **settings: Any) -> Tensor:
    torch.manual_seed(2)
    model = Model(Cell(), **settings)
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(3, 5)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = wrap(step)
    return torch.stack([run(x) for _ in range(3)])


@by_mode
def test_a_whole_step_compiles_no_more_than_its_parts(mode: str) -> None:
    expected = training(lambda step: step, backward=MODES[mode])
    backend = Counting()
    found = training(lambda step: torch.compile(step, backend=backend), backward=MODES[mode])
    torch.testing.assert_close(found, expected)
    # Stem, head and loss, the optimiser's; and the cell's. Nothing of the driver or the adjoint.
    assert backend.cells == CELLS[mode]
    assert backend.graphs <= backend.cells + 5


@by_mode
def test_compiled_autograd_gives_the_same(mode: str) -> None:
    # The graph of a backward pass holds every step: a rough solve has as many kinds of them, and fewer.
    settings = {"backward": MODES[mode], "stopping": Stopping(rtol=1e-2)}
    expected = training(lambda step: step, **settings)
    torch.compiler.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        found = training(lambda step: torch.compile(step, backend="eager"), **settings)
    torch.testing.assert_close(found, expected)


def test_compiled_autograd_is_refused_where_the_graph_of_the_cell_is_needed() -> None:
    mode = SharedInverse()
    with (
        torch._dynamo.config.patch(compiled_autograd=True),
        pytest.raises(Exception, match=r"compiled autograd .*backward=ImplicitDifferentiation"),
    ):
        training(
            lambda step: torch.compile(step, backend="eager"),
            backward=mode,
            solver=Anderson(memory=5),
            stopping=Stopping(rtol=1e-4),
        )


def second_derivative(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    found: Tensor = torch.autograd.grad(first.square().sum(), x)[0]
    return found


@pytest.mark.parametrize("compiles", ["cell", "cell in place", "function", "layer"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_cell_is_differentiated_twice_where_pytorch_does_that(compiles: str, backend: str) -> None:
    x, cell = torch.randn(2, 5), Cell()
    expected = second_derivative(ImplicitLayer(cell, stopping=TIGHT, backward=MODES["implicit"]), x)
    given: Any = cell
    if compiles == "cell":
        given = torch.compile(cell, backend=backend)
    elif compiles == "cell in place":
        cell.compile(backend=backend)
    elif compiles == "function":
        given = torch.compile(lambda z, x: cell(z, x), backend=backend)
    layer: Any = ImplicitLayer(given, stopping=TIGHT, backward=MODES["implicit"])
    run = torch.compile(layer, backend=backend) if compiles == "layer" else layer
    if backend == "aot_eager":  # as for the compiled module by itself
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            second_derivative(run, x)
        return
    torch.testing.assert_close(second_derivative(run, x), expected, rtol=1e-5, atol=1e-5)


def test_an_error_leaves_the_region_as_it_was() -> None:
    impossible = Stopping(rtol=1e-12, max_steps=2)
    model = Model(Cell(), stopping=impossible, on_failure="raise")
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        with pytest.raises(NonConvergenceError):
            compiled(torch.randn(2, 5))
        assert compiler_in_force() is None
    assert backend.cells == 1


def test_a_function_that_solves_may_be_compiled() -> None:
    cell, backend = Cell(), Counting()

    def solve(x: Tensor) -> tuple[Tensor, int]:
        solution = fixed_point(cell, torch.zeros_like(x), (x,), stopping=TIGHT)
        return solution.value, solution.nfe

    x = torch.randn(2, 5)
    compiled = torch.compile(solve, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), solve(x))
    assert backend.cells == 2


@pytest.mark.slow
def test_a_step_compiled_to_kernels_gives_the_same() -> None:
    expected = training(lambda step: step)
    for mode in (None, "reduce-overhead"):
        torch.compiler.reset()
        found = training(lambda step, mode=mode: torch.compile(step, mode=mode))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_compiler_is_not_loaded_where_nothing_is_compiled() -> None:
    script = "import sys, torch, deqlib\nx = torch.ones(2, 3, requires_grad=True)\n"
    script += "deqlib.ImplicitLayer(lambda z, x: 0.5 * z + x)(x).sum().backward()\n"
    script += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize("stopping", [TIGHT, FIXED], ids=["tolerance", "steps"])
def test_the_cell_of_a_checkpointed_solve_is_compiled_and_the_checkpoint_is_not(stopping: Stopping) -> None:
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    model = ImplicitLayer(Cell(), solver=Picard(), stopping=stopping, backward=Unroll(checkpoint=True))
    x = torch.randn(4, 5)

    def gradients(layer: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).square().sum(), list(model.parameters())))

    expected = gradients(model)
    for found, wanted in zip(gradients(torch.compile(model, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]

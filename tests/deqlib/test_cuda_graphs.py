"""Fixed solves under `torch.compile(mode="reduce-overhead")`, which captures what it compiled as CUDA graphs.

The compiler gives up on a graph that meets a tensor of the host, writes to its inputs or holds what cannot be
captured. Whether one does can be read off the graph, without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode

from deqlib import (
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    Solver,
    Stopping,
)

pytestmark = pytest.mark.gpu

SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(memory=3),
    "Broyden": Broyden(memory=3),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}
HAS_CUDA = torch.backends.cuda.is_built()
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
LONG = ("NewtonKrylov", "Auto")  # to trace; Auto is Picard and Anderson


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.uniform_(self.linear.weight, -0.2, 0.2)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def layer_of(solver: Solver) -> ImplicitLayer:
    return ImplicitLayer(Cell(), solver=solver, stopping=Stopping.steps(3), backward=JFB())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SOLVERS]
)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # of PyTorch's own
def test_the_graph_of_a_fixed_solve_holds_nothing_that_keeps_it_from_being_captured(name: str) -> None:
    device = "cuda" if HAS_CUDA else "cpu"  # that of shapes without numbers: it need not be there
    with FakeTensorMode(), torch.device(device):
        layer, x = layer_of(SOLVERS[name]), torch.empty(4, 8)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=False)
    assert get_first_incompatible_cudagraph_node(program.graph_module) is None
    assert not program.constants
    assert not program.graph_signature.buffers_to_mutate
    assert not program.graph_signature.user_inputs_to_mutate
    made = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    assert {t.device.type for t in flat(made)} == {device}


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in flat(value)] if isinstance(values, list | tuple) else []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("training", [False, True])
@by_solver
def test_a_fixed_solve_is_captured_and_replayed_for_other_inputs(solver: Solver, training: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = layer_of(solver).cuda()
    captured = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # the first warms up, the second captures
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.set_grad_enabled(training):
            torch.compiler.cudagraph_mark_step_begin()
            actual, expected = captured(x).clone(), layer(x)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            if training:
                wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
                found = torch.autograd.grad(actual.square().sum(), list(layer.parameters()))
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0

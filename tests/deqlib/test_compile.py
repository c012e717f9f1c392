"""Compiled solves, and solves on devices that the host should not wait for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from problems import SOLVERS, problem, residuals
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deqlib.driver
import deqlib.solvers.base
import deqlib.solvers.secant
from deqlib import (
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    Solver,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.driver import iterate

COMPILED: dict[str, Solver] = {
    "picard": Picard(damping=0.5),
    "anderson": Anderson(memory=3),
    "anderson I damped": Anderson(memory=3, kind="I", damping=0.7),
    "broyden": Broyden(memory=3),
    "newton": NewtonKrylov(memory=3),
    "newton jvp": NewtonKrylov(memory=3, derivative="jvp"),
    "auto": Auto(),
}


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_a_fixed_number_of_steps_compiles_without_a_graph_break(name: str, measure: bool) -> None:
    base = problem("mlp", dtype=torch.float32)
    layer = ImplicitLayer(
        lambda z, x: base.cell(z, x, *base.tensors[1:]),
        solver=COMPILED[name],
        stopping=Stopping.steps(8, measure=measure),
    )
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        found = compiled(base.x)
        if isinstance(COMPILED[name], NewtonKrylov):  # compiled, it cannot stop its inner solves early
            assert (residuals(base.f, found)[1] < 1e-3).all()
        else:
            torch.testing.assert_close(found, layer(base.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [Unroll(), JFB(), PhantomGradient()], ids=lambda b: type(b).__name__)
def test_training_compiles_without_a_graph_break(backward: Any) -> None:
    base = problem("tanh")
    layer = ImplicitLayer(base.cell, solver=Picard(), backward=backward, stopping=Stopping.steps(4))
    gradients = []
    torch.compiler.reset()
    for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        tensors = base.requiring_grad().tensors
        gradients.append(torch.autograd.grad(run(*tensors).sum(), tensors))
    torch.testing.assert_close(*gradients)


def test_the_cell_may_be_compiled() -> None:
    base = problem("mlp")
    torch.compiler.reset()
    cell = torch.compile(base.f, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain, compiled = (fixed_point(f, base.z0, stopping=Stopping(rtol=1e-8)) for f in (base.f, cell))
    assert torch.equal(plain.value, compiled.value)
    assert plain.nfe == compiled.nfe


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    names = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: reading a number costs, so nothing must be read that need not be."""
    for module in (deqlib.driver, deqlib.solvers.base, deqlib.solvers.secant):
        monkeypatch.setattr(module, "can_look", lambda z: False)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("check_every", [1, 4, 16])
@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(memory=4)], ids=["picard", "anderson", "broyden"]
)
def test_the_host_waits_for_the_device_once_a_check(solver: Solver, check_every: int) -> None:
    base = problem(contraction=0.9)
    stopping = Stopping(rtol=1e-10, max_steps=100, check_every=check_every, patience=None)
    with Waits() as waits:
        solution = iterate(base.f, base.z0, solver, stopping)
    assert solution.converged.all()
    assert sum(waits.counts.values()) <= 1 + solution.nfe / check_every


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_fixed_number_of_steps_never_waits(solver: Solver) -> None:
    base = problem()
    with Waits() as waits:
        iterate(base.f, base.z0, solver, Stopping.steps(12, measure=True))
    assert not waits.counts


@pytest.mark.parametrize("kind", ["tanh", "mlp"])
@pytest.mark.parametrize("solver", [*SOLVERS.values(), Auto()], ids=[*SOLVERS, "auto"])
def test_a_blind_solve_is_the_same_solve(solver: Solver, kind: str, request: pytest.FixtureRequest) -> None:
    base = problem(kind, batch=5, contraction=0.9)
    speed = torch.tensor([0.1, 0.5, 0.8, 1.0, -3.0], dtype=torch.float64).unsqueeze(1)

    def cell(z: Tensor) -> Tensor:
        return speed * base.f(z)

    stopping = Stopping(rtol=1e-9, max_steps=40)
    looking = fixed_point(cell, base.z0, solver=solver, stopping=stopping, on_failure="ignore")
    request.getfixturevalue("blind")
    blind = fixed_point(cell, base.z0, solver=solver, stopping=stopping, on_failure="ignore")
    assert torch.equal(looking.status, blind.status)
    assert torch.equal(looking.num_steps, blind.num_steps)
    assert looking.nfe == blind.nfe
    torch.testing.assert_close(looking.value, blind.value, rtol=1e-9, atol=1e-12)
    for cause, counts in looking.rejections.items():
        assert torch.equal(counts, blind.rejections[cause])


TWO_LAYERS = """
import torch
from deqlib import ImplicitLayer, Picard, Stopping

with torch.no_grad():
    for rate in (0.5, 0.25):
        cell = lambda z, x, rate=rate: rate * z + x
        layer = ImplicitLayer(cell, solver=Picard(), stopping=Stopping.steps(2))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        print(float(compiled(torch.ones(1, 1))))
"""


def test_a_second_layer_compiles_in_a_process_that_never_solved_eagerly() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_LAYERS], capture_output=True, text=True)
    assert done.stdout.split() == ["1.5", "1.25"], done.stderr[-2000:]

"""Compiled solves, and solves on devices that the host should not wait for."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import SOLVERS, problem
from torch import Tensor
from waits import Waits, look_at_nothing

from deqlib import (
    GMRES,
    JFB,
    Anderson,
    Auto,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    PhantomGradient,
    Picard,
    ReversiblePicard,
    Solver,
    Step,
    Stopping,
    Unroll,
    fixed_point,
)
from deqlib.driver import approach, iterate
from deqlib.state import flatten

COMPILED: dict[str, Solver] = {
    "picard": Picard(damping=0.5),
    "anderson": Anderson(memory=3),
    "anderson I damped": Anderson(memory=3, kind="I", damping=0.7),
    "broyden": Broyden(memory=3),
    "newton": NewtonKrylov(),
    "newton of little memory": NewtonKrylov(memory=3),
    "newton jvp": NewtonKrylov(derivative="jvp"),
    "auto": Auto(),
}


# Their steps are those of "newton" with another inside, of which what is measured knows nothing.
SAME_STEP = ("newton of little memory", "newton jvp")
# Tracing takes seconds, so a quick run has few variants, and what is measured, for all alike, with two alone.
QUICK = [*((name, False) for name in COMPILED if name not in SAME_STEP)]
QUICK += [("picard", True), ("anderson", True)]


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        pytest.param(name, measure, marks=[] if (name, measure) in QUICK else pytest.mark.slow)
        for name in COMPILED
        for measure in ((False, True) if name not in SAME_STEP else (False,))
    ],
)
def test_a_fixed_number_of_steps_compiles_without_a_graph_break(name: str, measure: bool) -> None:
    base = problem("mlp", dtype=torch.float32)
    layer = ImplicitLayer(
        lambda z, x: base.cell(z, x, *base.inputs[1:]),
        solver=COMPILED[name],
        stopping=Stopping.steps(6, measure=measure),  # twice the memory: the oldest is written over
    )
    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        found = compiled(base.inputs[0])
        torch.testing.assert_close(found, layer(base.inputs[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [Unroll(), JFB(), PhantomGradient()], ids=lambda b: type(b).__name__)
def test_training_compiles_without_a_graph_break(backward: Any) -> None:
    base = problem("tanh")
    layer = ImplicitLayer(base.cell, solver=Picard(), backward=backward, stopping=Stopping.steps(4))
    gradients = []
    torch.compiler.reset()
    for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        tensors = base.requiring_grad().inputs
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


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    look_at_nothing(monkeypatch)


ALL: dict[str, Solver] = {
    **SOLVERS,
    "anderson I": Anderson(kind="I"),
    "reversible": ReversiblePicard(),
    "newton": NewtonKrylov(),
    "newton jvp": NewtonKrylov(derivative="jvp"),
    "gmres": GMRES(),
    "gmres of little memory": GMRES(memory=3),
    "auto": Auto(),
}
by_solver = pytest.mark.parametrize("solver", ALL.values(), ids=ALL)


def test_every_way_to_read_a_number_is_counted() -> None:
    z = torch.zeros(3)
    ways = [
        z.tolist,
        z[0].item,
        lambda: bool(z.any()),
        z.nonzero,
        lambda: torch.equal(z, z),
        lambda: z[z > 0],
        lambda: z.__setitem__(z > 0, 1.0 + z[:0]),
    ]
    for read in ways:
        with Waits() as waits:
            read()
        assert sum(waits.counts.values()) >= 1
    before = waits.counts.total()
    z.tolist()
    assert waits.counts.total() == before  # outside


def reads_by_step(f: Any, z0: Tensor, solver: Solver, stopping: Stopping, **settings: Any) -> list[int]:
    """How often the host waited after each evaluation and before the next."""
    seen: list[int] = []
    with Waits() as waits:

        def counted(z: Tensor) -> Tensor:
            seen.append(waits.counts.total())
            return f(z)

        solution = iterate(counted, z0, solver, stopping, **settings)
        seen.append(waits.counts.total())
    assert solution.nfe == len(seen) - 1
    assert seen[0] == 0
    return [after - before for before, after in itertools.pairwise(seen)]


HANDING_ON = 5  # most reads of `Auto` at a check beyond those of the driver


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("check_every", [1, 4, 16])
@by_solver
def test_the_host_waits_for_the_device_at_checks_alone(solver: Solver, check_every: int) -> None:
    base = problem("linear", contraction=0.8)
    stopping = Stopping(rtol=1e-10, max_steps=400, check_every=check_every, patience=None)
    reads = reads_by_step(base.f, base.z0, solver, stopping)
    assert len(reads) < 401  # all converged
    for step, count in enumerate(reads):
        # Once for what was found, and once more for who is left where somebody may have finished. Auto reads
        # more where it judges a method and hands samples on.
        assert count <= (0 if step % check_every else 2 + HANDING_ON * isinstance(solver, Auto)), (
            step,
            reads,
        )


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", ["picard", "reversible", "anderson", "broyden", "gmres"])
def test_the_host_waits_once_while_nobody_may_have_finished(name: str) -> None:
    x = problem("linear").inputs[0]
    reads = reads_by_step(lambda z: 0.5 * z + x, torch.zeros_like(x), ALL[name], Stopping(rtol=1e-6))
    # At the first evaluation a sample may be lost, at the last the tolerance is met.
    assert reads == [2] + [1] * (len(reads) - 2) + [2]


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("check_every", [1, 3])
@by_solver
def test_finished_samples_leave_the_batch_at_checks_alone(solver: Solver, check_every: int) -> None:
    base = problem("linear", batch=6, dim=24, contraction=1.5)  # of spectral radius 0.8
    speed = torch.linspace(0.02, 1, 6, dtype=torch.float64).unsqueeze(1)
    seen: list[tuple[int, int]] = []
    with Waits() as waits:

        def cell(z: Tensor, x: Tensor, speed: Tensor) -> Tensor:
            seen.append((len(z), waits.counts.total()))
            return speed * base.cell(z, x, base.inputs[1])

        f, z0 = flatten(cell, base.z0, (base.inputs[0], speed))
        stopping = Stopping(rtol=1e-9, max_steps=400, check_every=check_every, patience=None)
        found = approach(f, z0, solver, stopping, compact=f).settled()
    assert found.converged.all()
    left = 0
    for step, ((batch, before), (smaller, after)) in enumerate(itertools.pairwise(seen)):
        leave = smaller < batch
        left += leave
        # Once more for which they are; in `Auto` they are looked up for every part of the batch.
        most = 2 + leave + 3 * HANDING_ON * isinstance(solver, Auto)
        assert after - before <= (0 if step % check_every else most), (step, seen)
    assert left > 0


@pytest.mark.usefixtures("blind")
@by_solver
@pytest.mark.parametrize("measure", [False, True])
def test_a_fixed_number_of_steps_never_waits(solver: Solver, measure: bool) -> None:
    base = problem()
    with Waits() as waits:
        iterate(base.f, base.z0, solver, Stopping.steps(12, measure=measure))
    assert not waits.counts


@pytest.mark.parametrize("kind", ["tanh", "mlp"])
@by_solver
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
        cell = lambda z, x, *, rate=rate: rate * z + x
        layer = ImplicitLayer(cell, solver=Picard(), stopping=Stopping.steps(2))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        print(float(compiled(torch.ones(1, 1))))
"""


def test_a_second_layer_compiles_in_a_process_that_never_solved_eagerly() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_LAYERS], capture_output=True, text=True)
    assert done.stdout.split() == ["1.5", "1.25"], done.stderr[-2000:]


def test_a_compiler_traces_cells_that_know_their_step_and_return_more() -> None:
    def cell(z: Tensor, x: Tensor, *, step: Step) -> tuple[Tensor, Tensor]:
        image = torch.tanh(0.3 * z + x + (step.number / step.total).unsqueeze(1))
        return image, image * x

    layer = ImplicitLayer(
        cell,
        solver=Picard(),
        stopping=Stopping.steps(3),
        backward=Unroll(),
        has_aux=True,
        with_step=True,
    )

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        solution = layer.solve(x)
        return solution.value, solution.aux

    x = torch.randn(4, 3)
    for found, expected in zip(torch.compile(both, backend="eager", fullgraph=True)(x), both(x), strict=True):
        torch.testing.assert_close(found, expected)

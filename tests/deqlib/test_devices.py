"""Solves, derivatives and what belongs to them on a device, against float64 on the CPU.

The device is that of the fixture `device`: a GPU where there is one.
"""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from devices import assert_near, never_waiting
from problems import TIGHT, Cell, Problem, problem, solution_of
from torch import Tensor, nn
from waits import replace_everywhere

from deqlib import (
    GMRES,
    JFB,
    AdjointStart,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    NonConvergenceWarning,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solution,
    Solver,
    Status,
    StochasticJFB,
    Stopping,
    Unroll,
    diagnose,
    fixed_point,
    record,
)
from deqlib.nn import Dropout, spectral_norm
from deqlib.regularizers import jacobian_penalty
from deqlib.testing import convolution, drift, explosion, mixed_difficulty, transformer

pytestmark = [
    pytest.mark.gpu,
    # PyTorch has much to say about a GPU that is no fault of the code under test.
    pytest.mark.filterwarnings("default::UserWarning", "error::deqlib.NonConvergenceWarning"),
]

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.7),
    "reversible": ReversiblePicard(damping=0.7),
    "anderson": Anderson(),
    "anderson of type I": Anderson(kind="I"),
    "broyden": Broyden(),
    "broyden of little memory": Broyden(memory=4),
    "newton": NewtonKrylov(),
    "newton by jvp": NewtonKrylov(derivative="jvp"),
    "gmres": GMRES(),
    "auto": Auto(),
}
TYPES = [torch.float32, torch.float64]
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
by_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def solvable(solver: Solver) -> list[Problem]:
    """Contractions in float64, affine ones alone for a solver that wants them."""
    kinds = ["linear"] if isinstance(solver, GMRES) else ["linear", "mlp"]
    return [problem(kind, batch=5, dim=12, contraction=0.5) for kind in kinds]


def solve(base: Problem, **settings: Any) -> Solution:
    with torch.no_grad():
        return fixed_point(base.cell, base.z0, base.inputs, **settings)


# Solves --------------------------------------------------------------------------------------------------


@by_type
@by_solver
def test_a_solve_is_that_on_the_cpu(solver: Solver, dtype: torch.dtype, device: torch.device) -> None:
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    settings: dict[str, Any] = {"solver": solver, "stopping": Stopping(rtol=rtol, max_steps=120)}
    for base in solvable(solver):
        expected, found = solve(base, **settings), solve(base.to(dtype, device), **settings)
        assert found.converged.all()
        assert (found.value.device.type, found.value.dtype) == (device.type, dtype)
        assert_near(found.value, expected.value, 10 * rtol)
        assert_near(found.value, solution_of(base), 10 * rtol)
        if dtype == torch.float64:  # rounding does not decide
            assert_near(found.num_steps, expected.num_steps, 0)
            assert found.nfe == expected.nfe
            assert found.method.tolist() == expected.method.tolist()


@by_solver
def test_all_that_is_known_about_a_solve_is_on_the_device(solver: Solver, device: torch.device) -> None:
    found = solve(
        solvable(solver)[0].to(device=device), solver=solver, stopping=Stopping(rtol=1e-6, max_steps=120)
    )
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    kept = {name: value for name, value in values.items() if isinstance(value, Tensor)} | found.rejections
    assert {"value", "residual", "relative_residual", "num_steps", "status", "trace", "method"} < set(kept)
    assert {value.device.type for value in kept.values()} == {device.type}
    assert "converged" in repr(found)
    assert found.counts() == {Status.CONVERGED: 5}
    assert sum(found.method_counts().values()) == 5


@pytest.mark.parametrize("measure", [False, True])
@by_solver
def test_a_fixed_number_of_steps_is_that_on_the_cpu(
    solver: Solver, measure: bool, device: torch.device
) -> None:
    for base in solvable(solver):
        stopping = Stopping.steps(6, measure=measure)
        expected = solve(base, solver=solver, stopping=stopping)
        found = solve(base.to(device=device), solver=solver, stopping=stopping)
        assert_near(found.value, expected.value, 1e-9)
        assert found.nfe == expected.nfe
        if measure:
            assert_near(found.trace, expected.trace, 1e-8)


@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "newton", "auto"])
def test_every_sample_has_the_status_that_it_has_on_the_cpu(name: str, device: torch.device) -> None:
    for made in (drift, explosion):
        base = made(dtype=torch.float64)
        base.inputs[0][0] = torch.nan  # one more way to fail, of one sample
        settings: dict[str, Any] = {"solver": SOLVERS[name], "stopping": Stopping(rtol=1e-8, max_steps=15)}
        expected = solve(base, **settings, on_failure="ignore")
        with pytest.warns(NonConvergenceWarning, match="DIVERGED"):
            found = solve(base.to(device=device), **settings)
        assert found.status.tolist() == expected.status.tolist()
        assert not found.converged.any()


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "newton", "auto"])
def test_finished_samples_leave_the_batch(name: str, check_every: int, device: torch.device) -> None:
    base = mixed_difficulty(batch=6, width=16, hard=0.8, dtype=torch.float64)
    settings: dict[str, Any] = {
        "solver": SOLVERS[name],
        "stopping": Stopping(rtol=1e-8, max_steps=300, check_every=check_every),
        "compact": True,
    }
    expected, found = solve(base, **settings), solve(base.to(device=device), **settings)
    if name != "auto" or check_every == 1:  # a GPU is looked at less often, and so methods change later
        assert found.sample_nfe.tolist() == expected.sample_nfe.tolist()
    assert found.sample_nfe.min() < found.sample_nfe.max()
    assert_near(found.value, base.solution, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "auto"])
def test_states_of_half_precision_converge(name: str, dtype: torch.dtype, device: torch.device) -> None:
    base = solvable(SOLVERS[name])[-1]
    stopping = Stopping(rtol=2e-2, max_steps=60)
    found = solve(base.to(dtype, device), solver=SOLVERS[name], stopping=stopping)
    assert found.value.dtype == dtype
    assert_near(found.value, solution_of(base), 0.1)


@pytest.mark.parametrize("made", [convolution, transformer], ids=lambda f: f.__name__)
def test_cells_of_convolutions_and_attention(made: Callable[..., Problem], device: torch.device) -> None:
    sizes = (
        {"channels": 4, "side": 6} if made is convolution else {"tokens": 5, "width": 16, "injection": 4.0}
    )
    base = made(batch=3, **sizes, dtype=torch.float64)
    stopping = Stopping(rtol=1e-8, max_steps=100)
    for axes in (None, (1,)):  # one norm a sample, or each place by itself
        rule = replace(stopping, norm_axes=axes)
        expected, found = (solve(b, solver=Anderson(), stopping=rule) for b in (base, base.to(device=device)))
        assert found.num_steps.tolist() == expected.num_steps.tolist()
        assert_near(found.value, base.solution, 1e-6)


def test_a_nested_state_that_goes_on_where_it_ended(device: torch.device) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64, device=device).view(3, 4)

    def cell(state: dict[str, Any], shift: float) -> dict[str, Any]:
        a, (b,) = state["a"], state["rest"]
        return {"a": 0.5 * torch.tanh(b.flatten(1)) + x, "rest": (0.5 * torch.sin(a.view(3, 2, 2)) + shift,)}

    z0 = {"a": torch.zeros_like(x), "rest": (torch.zeros_like(x).view(3, 2, 2),)}
    settings: dict[str, Any] = {"solver": Broyden(), "stopping": Stopping(rtol=1e-10)}
    with torch.no_grad(), record() as solves:
        first = fixed_point(cell, z0, (0.1,), **settings)
        again = fixed_point(cell, first.value, (0.1001,), state=first.state, **settings)
    assert again.nfe < first.nfe
    assert first.value["rest"][0].device.type == device.type
    assert len(solves) == 2


# Derivatives ---------------------------------------------------------------------------------------------

EXACT = Stopping(rtol=TIGHT, max_steps=300, patience=None)
ADJOINT = ImplicitDifferentiation(stopping=EXACT)


def looped(base: Problem) -> Tensor:
    """The fixed point by a loop that autograd records."""
    z = base.z0
    for _ in range(60):
        z = base.f(z)
    return z


def damped(base: Problem) -> Tensor:
    z = solution_of(base)
    for _ in range(5):
        z = torch.lerp(z, base.f(z), 0.5)
    return z


def cut(base: Problem) -> Tensor:
    """Three steps that are not recorded and four that are."""
    z = base.z0
    for step in range(7):
        z = base.f(z.detach() if step == 3 else z)
    return z


# How the layer is solved, its backward mode, and what has the same gradient in a loop.
MODES: dict[str, tuple[Solver, Backward, Callable[[Problem], Tensor]]] = {
    "implicit": (Auto(), ADJOINT, looped),
    "implicit by anderson": (Anderson(), replace(ADJOINT, solver=Anderson()), looped),
    "implicit by gmres": (Broyden(), replace(ADJOINT, solver=GMRES()), looped),
    "implicit from the last adjoint": (Picard(), replace(ADJOINT, warm_start=AdjointStart()), looped),
    "unroll": (Picard(), Unroll(), looped),
    "unroll by anderson": (Anderson(memory=3), Unroll(), looped),
    "unroll with checkpoints": (Picard(), Unroll(checkpoint=True), looped),
    "reversible": (ReversiblePicard(damping=0.8), Reversible(on_drift="ignore"), looped),
    "shared inverse": (Broyden(), SharedInverse(refine=15), looped),
    "jfb": (Anderson(), JFB(), lambda base: base.f(solution_of(base))),
    "phantom": (Anderson(), PhantomGradient(), damped),
    "phantom by a series": (Anderson(), PhantomGradient(form="neumann"), damped),
    "stochastic": (Picard(), StochasticJFB(no_grad=(3, 3), grad=(4, 4)), cut),
}


@by_type
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_a_loop_on_the_cpu(
    mode: str, dtype: torch.dtype, device: torch.device
) -> None:
    solver, backward, reference = MODES[mode]
    base = problem("mlp", contraction=0.5)
    g = torch.randn(base.z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = base.requiring_grad()
    expected = torch.autograd.grad(reference(exact), exact.inputs, g)
    here = base.to(dtype, device).requiring_grad()
    stopping, tolerance = (
        (EXACT, 1e-7) if dtype == torch.float64 else (Stopping(rtol=1e-6, max_steps=100), 1e-3)
    )
    if mode in ("implicit", "implicit by anderson", "implicit by gmres", "implicit from the last adjoint"):
        assert isinstance(backward, ImplicitDifferentiation)
        backward = replace(backward, stopping=stopping)
    found = fixed_point(
        here.cell,
        here.z0,
        here.inputs,
        solver=solver,
        stopping=stopping,
        backward=backward,
        on_failure="ignore",
    )
    gradients = torch.autograd.grad(found.value, here.inputs, g.to(here.z0))
    assert all(gradient.device.type == device.type for gradient in gradients)
    assert_near(gradients, expected, tolerance)


@pytest.mark.parametrize("mode", ["implicit", "implicit by gmres", "unroll"])
def test_second_derivatives_are_those_of_a_loop_on_the_cpu(mode: str, device: torch.device) -> None:
    solver, backward, _ = MODES[mode]

    def second(base: Problem, value: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(value.sin().sum(), base.inputs, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), base.inputs)

    exact, here = (problem("mlp").to(device=d).requiring_grad() for d in ("cpu", device))
    settings: dict[str, Any] = {"stopping": EXACT, "backward": backward, "on_failure": "ignore"}
    found = second(here, fixed_point(here.cell, here.z0, here.inputs, solver=solver, **settings).value)
    assert_near(found, second(exact, looped(exact)), 1e-7)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], dict[str, Tensor], Tensor], Any]] = {
    "grad": lambda f, p, x: torch.func.grad(lambda p: f(p, x).sin().sum())(p),
    "jvp": lambda f, p, x: torch.func.jvp(f, (p, x), (p, x.cos())),
    "vmap": lambda f, p, x: torch.func.vmap(lambda x: f(p, x[None]))(x),
    "gradients of samples": lambda f, p, x: torch.func.vmap(
        torch.func.grad(lambda p, x: f(p, x[None]).sin().sum()), in_dims=(None, 0)
    )(p, x),
    "hessian": lambda f, p, x: torch.func.hessian(lambda x: f(p, x).sin().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_a_loop_on_the_cpu(name: str, device: torch.device) -> None:
    cell = Cell(4).double()
    layer = ImplicitLayer(
        copy.deepcopy(cell).to(device), stopping=EXACT, backward=ADJOINT, on_failure="ignore"
    )
    x = torch.randn(3, 4, dtype=torch.float64)

    def loop(p: dict[str, Tensor], x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.func.functional_call(cell, p, (z, x))
        return z

    def ours(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {f"cell.{n}": t for n, t in p.items()}, (x,))

    expected = TRANSFORMS[name](loop, {n: t.detach() for n, t in cell.named_parameters()}, x)
    parameters = {n: t.detach() for n, t in layer.cell.named_parameters()}
    assert_near(TRANSFORMS[name](ours, parameters, x.to(device)), expected, 1e-7)


# What must not wait --------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [False, True])
@by_solver
def test_a_fixed_number_of_steps_never_waits(solver: Solver, measure: bool, device: torch.device) -> None:
    base = solvable(solver)[-1].to(torch.float32, device)
    stopping = Stopping.steps(5, measure=measure)
    solve(base, solver=solver, stopping=stopping)  # libraries are loaded
    with never_waiting(device):
        solve(base, solver=solver, stopping=stopping)


# All but `Reversible`, which looks at every step back whether a sample is lost.
FIXED: dict[str, tuple[Solver, Backward]] = {
    name: (solver, replace(backward, stopping=Stopping.steps(6)) if name.startswith("implicit") else backward)
    for name, (solver, backward, _) in MODES.items()
    if name != "reversible"
}


@pytest.mark.parametrize("mode", FIXED)
def test_training_by_fixed_numbers_of_steps_never_waits(mode: str, device: torch.device) -> None:
    solver, backward = FIXED[mode]
    base = problem("mlp").to(torch.float32, device).requiring_grad()
    layer = ImplicitLayer(base.cell, solver=solver, backward=backward, stopping=Stopping.steps(6))

    def step() -> None:
        torch.autograd.grad(layer(*base.inputs).square().sum(), base.inputs)

    step()
    with never_waiting(device):
        step()


# What goes with layers -----------------------------------------------------------------------------------


def test_autocast_and_a_scaler_train_a_layer(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        cell = Cell(8).to(device)
        layer = ImplicitLayer(cell, stopping=Stopping(rtol=1e-2), on_failure="ignore")
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=256.0)
        x, target = torch.randn(16, 8, device=device), torch.rand(16, 8, device=device) - 0.5
        losses = []
        for _ in range(4):
            with torch.autocast(device.type, dtype=dtype):
                loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]


def test_a_step_that_overflows_is_left_out(device: torch.device) -> None:
    cell = Cell(8).to(device)
    layer = ImplicitLayer(cell, stopping=Stopping(rtol=1e-2), on_failure="ignore")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    before = cell.inner.weight.detach().clone()
    with torch.autocast(device.type, dtype=torch.float16):
        loss = layer(torch.randn(4, 8, device=device)).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(cell.inner.weight, before)
    assert scaler.get_scale() == 2.0**59


def test_a_penalty_and_masks_drawn_on_either_device(device: torch.device) -> None:
    scale = torch.tensor([0.5, -2.0, 0.0, 3.0], device=device)
    z = torch.randn(3, 4, device=device)
    for where in ("cpu", device):
        generator = torch.Generator(where).manual_seed(0)
        # Exact with one probe, whatever its signs.
        penalty = jacobian_penalty(lambda z: scale * z + 1, z, generator=generator)
        torch.testing.assert_close(penalty, scale.square().mean())
        layer = ImplicitLayer(Dropped(generator), stopping=Stopping(rtol=1e-5))
        values = layer(z).unique()  # 1 where dropped, 2 where kept and doubled
        torch.testing.assert_close(values, torch.tensor([1.0, 2.0], device=device), rtol=1e-3, atol=0)


class Dropped(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.dropout = Dropout(0.5, generator=generator)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.25 * self.dropout(z) + 1 + 0 * x


def test_weights_of_a_norm_move_with_their_module(device: torch.device) -> None:
    linear_map = spectral_norm(nn.Linear(6, 6), 0.8, num_iterations=50).to(device)
    layer = ImplicitLayer(lambda z, x: torch.tanh(linear_map(z) + x), stopping=Stopping(rtol=1e-5))
    layer(torch.randn(2, 6, device=device)).sum().backward()
    norm = torch.linalg.matrix_norm(linear_map.weight, 2)
    assert abs(float(norm.detach()) - 0.8) < 1e-3
    assert linear_map.parametrizations.weight.original.grad.device.type == device.type


def test_a_state_dict_goes_from_one_device_to_the_other(device: torch.device) -> None:
    layer = ImplicitLayer(Cell(6).to(device), stopping=Stopping(rtol=1e-6))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ImplicitLayer(Cell(6), stopping=Stopping(rtol=1e-6))
    other.load_state_dict(torch.load(file, map_location="cpu"))
    x = torch.randn(2, 6)
    assert_near(layer(x.to(device)), other(x), 1e-5)


def test_a_layer_is_diagnosed_where_it_is(device: torch.device) -> None:
    layer = ImplicitLayer(Cell(6).to(device), stopping=Stopping(rtol=1e-4))
    text = str(diagnose(layer, torch.randn(4, 6, device=device)))
    assert "converged" in text


# Kernels -------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(device: torch.device) -> Any:
    """The package of fused steps, where they run."""
    found = pytest.importorskip("deqlib.fused")
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        pytest.skip("kernels of Triton run on a GPU alone; on the CPU they are tried by its interpreter")
    return found


FUSED = {name: SOLVERS[name] for name in ("picard", "anderson", "anderson of type I", "broyden", "auto")}
by_fused = pytest.mark.parametrize("solver", FUSED.values(), ids=FUSED)


@by_type
@by_fused
def test_fused_steps_are_the_plain_ones(
    solver: Solver, dtype: torch.dtype, fused: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    settings: dict[str, Any] = {"solver": solver, "stopping": Stopping(rtol=rtol, max_steps=60)}
    problems = [base.to(dtype, device) for base in solvable(solver)]
    assert fused.is_available(problems[0].z0)
    found = [solve(base, **settings) for base in problems]
    assert fused.is_available(problems[0].z0)  # no kernel failed
    replace_everywhere(monkeypatch, fused.is_available, lambda *tensors: False)
    for ours, base in zip(found, problems, strict=True):
        plain = solve(base, **settings)
        assert_near(ours.value, plain.value, rtol)
        if dtype == torch.float64:
            assert ours.num_steps.tolist() == plain.num_steps.tolist()
            assert_near(ours.trace, plain.trace, 1e-6)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_a_fused_step_takes_six_kernels_at_most(name: str, fused: Any, device: torch.device) -> None:
    x, rates = torch.randn(64, 1000, device=device), torch.linspace(0.1, 0.95, 1000, device=device)

    def kernels(num_steps: int) -> int:
        stopping = Stopping(rtol=0, atol=0, max_steps=num_steps, patience=None)
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
        ):
            fixed_point(
                lambda z: torch.addcmul(x, z, rates),
                torch.zeros_like(x),
                solver=SOLVERS[name],
                stopping=stopping,
                on_failure="ignore",
            )
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names)

    kernels(12)  # compiles them
    short, long = kernels(12), kernels(22)  # full histories
    if not long:
        pytest.skip("the profiler sees no kernels here")
    assert (long - short) / 10 <= 6 + 1  # one is the cell's


# Compiled ------------------------------------------------------------------------------------------------


def test_a_compiled_layer_replays_its_kernels_on_other_inputs(device: torch.device) -> None:
    base = compilable(device)
    layer = ImplicitLayer(base.cell, solver=Anderson(memory=2), stopping=Stopping.steps(3))
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for scale in (1.0, 2.0, -1.0):  # one to warm up, one to record, one to replay
            inputs = (scale * base.inputs[0], *base.inputs[1:])
            torch.testing.assert_close(compiled(*inputs).clone(), layer(*inputs), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_trains_as_it_does_uncompiled(device: torch.device) -> None:
    base = compilable(device).requiring_grad()
    layer = ImplicitLayer(base.cell, solver=Picard(), backward=Unroll(), stopping=Stopping.steps(3))
    found, expected = (
        torch.autograd.grad(run(*base.inputs).sum(), base.inputs)
        for run in (torch.compile(layer, fullgraph=True), layer)
    )
    assert_near(found, expected, 1e-4)


def compilable(device: torch.device) -> Problem:
    if device.type != "cuda":
        pytest.skip("kernels for a GPU are compiled; on the CPU see test_compile.py")
    return problem("mlp", batch=8, dim=16).to(torch.float32, device)

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINDS, Problem, Spy, problem, problems
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from deqlib import (
    Anderson,
    Broyden,
    ImplicitLayer,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
    fixed_point,
)

MODES = (Unroll(), Unroll(checkpoint=True))
SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "anderson": Anderson(memory=3),
    "broyden": Broyden(memory=3),
}
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def solved(base: Problem, backward: Unroll, **settings: Any) -> Solution:
    settings = {"stopping": Stopping(rtol=1e-6), "on_failure": "ignore", **settings}
    return fixed_point(base.f, base.z0, backward=backward, **settings)


class WideCell(nn.Module):
    """x + W2 tanh(W1 z), many times wider inside than its state."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)
        with torch.no_grad():
            self.up.weight *= 0.5
            self.down.weight *= 0.5

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(z)))


# Gradients ----------------------------------------------------------------------------------------------


@by_solver
@given(base=problems())
def test_a_checkpointed_solve_has_the_value_the_counts_and_the_gradients_of_one_that_is_not(
    solver: Solver, base: Problem
) -> None:
    base = base.requiring_grad()
    plain, kept = (solved(base, mode, solver=solver, stopping=Stopping(rtol=1e-4)) for mode in MODES)
    assert torch.equal(kept.value, plain.value)
    assert torch.equal(kept.num_steps, plain.num_steps)
    assert torch.equal(kept.residual, plain.residual)
    assert kept.nfe == plain.nfe
    assert kept.value.requires_grad == plain.value.requires_grad
    found = [torch.autograd.grad(s.value.sin().sum(), base.inputs, allow_unused=True) for s in (plain, kept)]
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.equal(a, b)


@by_solver
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_without_checkpoints(solver: Solver, kind: str) -> None:
    base = problem(kind, batch=2, dim=3).requiring_grad()
    found = []
    for mode in MODES:
        value = solved(base, mode, solver=solver, stopping=Stopping.steps(5)).value
        slopes = torch.autograd.grad(value.sin().sum(), base.inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), base.inputs))
        assert all(s.norm() > 0 for s in found[-1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradients_reach_the_starting_point_and_parameters() -> None:
    layer = ImplicitLayer(WideCell(3, 16).double(), solver=Picard(), stopping=Stopping.steps(4))
    x, z0 = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for mode in MODES:
        layer.backward = mode
        loss = layer.solve(x, z0=z0).value.square().sum()
        found.append(torch.autograd.grad(loss, (x, z0, *layer.parameters())))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert all(gradient.norm() > 0 for gradient in found[0])


def test_a_pytree_state_is_checkpointed() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z0 = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": (torch.zeros(2, 1, dtype=torch.float64),)}

    def cell(state: dict[str, Any], x: Tensor) -> dict[str, Any]:
        return {"a": torch.tanh(0.3 * state["a"] + x), "b": (0.5 * state["b"][0] + state["a"][:, :1],)}

    found = []
    for mode in MODES:
        value = fixed_point(cell, z0, (x,), backward=mode, stopping=Stopping(rtol=1e-6)).value
        found.append(torch.autograd.grad((value["a"] * value["b"][0]).sum(), x)[0])
    assert torch.equal(*found)


def test_random_numbers_of_the_cell_are_drawn_again_as_they_were() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def cell(z: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(0.5 * z + x), 0.5)

    found = []
    for mode in MODES:
        torch.manual_seed(1)
        value = fixed_point(
            cell, torch.zeros_like(x), solver=Picard(), backward=mode, stopping=Stopping.steps(6)
        ).value
        found.append((value.detach(), *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [True, False], ids=["cached casts", "casts anew"])
def test_gradients_under_autocast_are_those_without_checkpoints(start: torch.dtype, cache: bool) -> None:
    layer = ImplicitLayer(WideCell(6, 16), solver=Picard(), stopping=Stopping.steps(5))
    x = torch.randn(3, 6, dtype=start)
    found = []
    for mode in MODES:
        layer.backward = mode
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            value = layer(x)
        value.float().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for a, b in zip(*found, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() <= 0.01 * a.norm()  # casts are summed in another order


@dataclass(frozen=True, kw_only=True)
class ByProducts(Solver):
    """Steps made of Jacobian products."""

    def init(self, z0: Tensor) -> Tensor:
        return torch.ones_like(z0)

    def direction(self, state: Tensor) -> Tensor:
        return state

    def step(self, z: Tensor, fz: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * z + fz, state


@pytest.mark.parametrize("solver", [NewtonKrylov(), ByProducts()], ids=["newton-krylov", "products alone"])
def test_jacobian_products_of_a_solver_are_no_obstacle(solver: Solver) -> None:
    base = problem("tanh", contraction=0.8).requiring_grad()
    plain, kept = (solved(base, mode, solver=solver, stopping=Stopping.steps(9)) for mode in MODES)
    assert torch.equal(kept.value, plain.value)
    found = [torch.autograd.grad(s.value.sum(), base.inputs) for s in (plain, kept)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert found[0][1].norm() > 0


# Counts and memory --------------------------------------------------------------------------------------


def test_every_evaluation_is_repeated_once_in_the_backward_pass_and_nfe_counts_the_forward_pass() -> None:
    base = problem("mlp").requiring_grad()
    f = Spy(base.f)
    solution = fixed_point(f, base.z0, solver=Picard(), backward=Unroll(checkpoint=True))
    assert solution.nfe == f.count
    solution.value.sum().backward()
    # The evaluation that found the tolerance met is no part of the value.
    assert f.count == 2 * solution.nfe - 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_checkpointed_where_autograd_is_off(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a checkpoint was made")

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", refuse)
    base = problem()
    with mode():
        assert solved(base, Unroll(checkpoint=True)).converged.all()
    with pytest.raises(AssertionError, match="a checkpoint was made"):
        solved(base, Unroll(checkpoint=True))


class Storages(TorchDispatchMode):
    """Notes every storage that is made, to count those that are still alive; not those of `cell`."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in cell.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def bytes_kept(
    backward: Unroll | StochasticJFB, steps: int, *, batch: int = 4, dim: int = 6, width: int = 96
) -> int:
    """Of a solve by its tape, counted exactly: saved tensors and what checkpoints keep besides."""
    cell = WideCell(dim, width)
    x = torch.randn(batch, dim)
    with Storages(cell) as storages:
        solution = fixed_point(
            cell,
            torch.zeros(batch, dim),
            (x,),
            solver=Picard(),
            backward=backward,
            stopping=Stopping.steps(steps),
        )
        value = solution.value
        del solution
        gc.collect()
        total = storages.alive()
    assert value.requires_grad
    return total


def test_the_tape_keeps_one_state_an_evaluation_instead_of_the_cells_activations() -> None:
    batch, dim, width, number = 4, 6, 96, 4
    per_step = [(bytes_kept(mode, 30) - bytes_kept(mode, 10)) / 20 for mode in MODES]
    assert per_step[0] == batch * (dim + width) * number
    assert batch * dim * number <= per_step[1] < 1.2 * batch * dim * number
    assert per_step[0] > 14 * per_step[1]


def test_steps_on_the_tape_of_a_random_number_keep_one_state_each_and_those_off_it_nothing() -> None:
    batch, dim, number = 4, 6, 4

    def kept(no_grad: int, grad: int) -> int:
        mode = StochasticJFB(no_grad=(no_grad, no_grad), grad=(grad, grad), checkpoint=True)
        return bytes_kept(mode, 1, batch=batch, dim=dim)

    assert batch * dim * number <= (kept(1, 30) - kept(1, 10)) / 20 < 1.2 * batch * dim * number
    assert kept(1, 3) == kept(100, 3)


@given(base=problems(), seed=st.integers(0, 99))
def test_a_random_number_of_checkpointed_steps_has_the_value_and_the_gradients_of_one_that_keeps_all(
    base: Problem, seed: int
) -> None:
    base = base.requiring_grad()
    found = []
    for checkpoint in (False, True):
        generator = torch.Generator().manual_seed(seed)
        mode = StochasticJFB(no_grad=(0, 3), grad=(1, 4), generator=generator, checkpoint=checkpoint)
        solution = fixed_point(base.f, base.z0, solver=Picard(), backward=mode, on_failure="ignore")
        slopes = torch.autograd.grad(solution.value.sin().sum(), base.inputs, allow_unused=True)
        found.append((solution.nfe, solution.value, *slopes))
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_all_a_checkpointed_solve_keeps_is_freed_without_the_garbage_collector() -> None:
    cell = WideCell(6, 32)
    gc.collect()
    gc.disable()
    try:
        with Storages(cell) as storages:
            settings = {
                "solver": Anderson(),
                "stopping": Stopping.steps(6),
                "backward": Unroll(checkpoint=True),
            }
            value = fixed_point(cell, torch.zeros(2, 6), (torch.ones(2, 6),), **settings).value
            assert storages.alive() > 0
            torch.autograd.grad(value.sum(), tuple(cell.parameters()))
            del value
            left = storages.alive()
        assert left == 0
    finally:
        gc.enable()


def test_finished_samples_leave_the_batch_of_checkpointed_evaluations() -> None:
    base = problem("tanh", batch=4, contraction=0.8)
    x = base.inputs[0].clone()
    x[:3] = 0
    seen = []
    for mode in MODES:
        f = Spy(base.cell)
        x.requires_grad_()
        settings = {"solver": Picard(), "stopping": Stopping(rtol=1e-6), "on_failure": "ignore"}
        solution = fixed_point(
            f, base.z0, (x, *base.inputs[1:]), backward=mode, compact=(0, None), **settings
        )
        seen.append([len(z) for z in f.states])
        # The whole batch has the last word; then comes the step that the gradient of the first three is of,
        # which begin at their solution.
        assert seen[-1][-3:] == [1, 4, 4]
        assert solution.sample_nfe[0] < solution.nfe
    assert seen[0] == seen[1]


def test_two_forwards_before_one_backward_are_independent() -> None:
    layer = ImplicitLayer(WideCell(3, 8), solver=Picard(), backward=Unroll(checkpoint=True))
    xs = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    apart = [torch.autograd.grad(layer(x).sin().sum(), x)[0] for x in xs]
    first, second = layer(xs[0]), layer(xs[1])
    together = torch.autograd.grad(first.sin().sum() + second.sin().sum(), xs)
    torch.testing.assert_close(list(together), apart, rtol=0, atol=0)


def test_a_checkpoint_around_the_layer_works_with_those_inside() -> None:
    layer = ImplicitLayer(WideCell(3, 8), solver=Picard(), backward=Unroll(checkpoint=True))
    x = torch.randn(2, 3, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    value = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value.sin().sum(), x)[0], expected)


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize("mode", [Unroll, StochasticJFB], ids=["Unroll", "StochasticJFB"])
def test_checkpoint_must_be_a_bool(mode: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{mode.__name__}: checkpoint must be True or False, got"):
        mode(checkpoint=value)


@pytest.mark.parametrize("name", ["gain", "context_fn", "cell", "function", "wrapper", "solve", "args"])
def test_inputs_by_name_are_checkpointed_whatever_they_are_called(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=draw, requires_grad=True)
    shift = torch.randn(3, 4, generator=draw, requires_grad=True)

    def function_of(z: Tensor, x: Tensor, **named: Tensor) -> Tensor:
        return torch.tanh(0.4 * z.roll(1, 1) + x * named[name])

    found = [
        torch.autograd.grad(
            fixed_point(function_of, torch.zeros_like(x), (x,), {name: shift}, backward=mode).value.sum(),
            (x, shift),
        )
        for mode in (Unroll(), Unroll(checkpoint=True))
    ]
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_cell_that_cannot_be_checkpointed_is_told_what_to_use() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    cell = lambda z, x: x - 0.1 * torch.func.grad(lambda z: z.sin().sum())(z)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"checkpoint=True.*torch.func.*use Unroll\(\) or"):
        fixed_point(cell, torch.zeros(2, 3), (x,), backward=Unroll(checkpoint=True))

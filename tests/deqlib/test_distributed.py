"""Two processes on one machine train one model; averaged gradients are those of the joint batch.

The processes get samples of different difficulty, so their solves take different numbers of steps: whatever
waits for the other process inside a solve would hang. A hang is a failure after `PATIENCE` seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deqlib import (
    JFB,
    Anderson,
    Backward,
    ImplicitDifferentiation,
    ImplicitLayer,
    PhantomGradient,
    Picard,
    StochasticJFB,
    Stopping,
    Unroll,
)

pytestmark = pytest.mark.slow  # two processes, which start once for all tests

WORLD, STEPS, SAMPLES, DIM = 2, 4, 3, 6
PATIENCE = 120  # seconds that all work of both processes may take
EXACT = Stopping(rtol=1e-12, max_steps=200)


class Cell(nn.Module):
    """Counts its evaluations, and the products with its Jacobian that a backward pass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.evaluations = self.products = 0
        with torch.no_grad():
            self.inner.weight *= 0.5

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        output = torch.tanh(self.inner(z) + x)
        if output.requires_grad:
            output.register_hook(self.count)
        return output

    def count(self, gradient: Tensor) -> None:
        self.products += 1


def make_backward(name: str) -> tuple[Backward, Any]:
    """A backward mode and the solver that goes with it."""
    generator = torch.Generator().manual_seed(11)  # the same in every process
    return {
        "implicit": (ImplicitDifferentiation(solver=Picard(), stopping=EXACT), Anderson()),
        "jfb": (JFB(), Anderson()),
        "phantom": (PhantomGradient(steps=2), Anderson()),
        "stochastic": (StochasticJFB(no_grad=(0, 2), grad=(1, 3), generator=generator), Picard()),
        "stochastic, each sample": (
            StochasticJFB(no_grad=(0, 2), grad=(1, 3), per="sample", generator=generator),
            Picard(),
        ),
        "unroll": (Unroll(), Picard()),
    }[name]


def make_model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    backward, solver = make_backward(name)
    layer = ImplicitLayer(Cell(), solver=solver, backward=backward, stopping=EXACT, on_failure="raise")
    return nn.Sequential(nn.Linear(4, DIM), layer, nn.Linear(DIM, 1)).double()


def make_batch(step: int) -> Tensor:
    """The joint batch; process r takes rows [r * SAMPLES, (r + 1) * SAMPLES), the first the hard ones.

    Large inputs saturate the tanh, which makes their fixed points easy.
    """
    generator = torch.Generator().manual_seed(100 + step)
    scale = torch.tensor([0.1, 8.0]).repeat_interleave(SAMPLES).unsqueeze(1)
    return scale * torch.randn(WORLD * SAMPLES, 4, generator=generator, dtype=torch.float64)


# How the processes keep their models together.


def fsdp_layer(model: nn.Sequential) -> nn.Module:
    """Every layer a group of its own, parameters freed between forward and backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_model(model: nn.Module) -> nn.Module:
    """The whole model one group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


@dataclass(frozen=True)
class Case:
    wrap: str
    mode: str
    micro: int = 1  # micro batches a step

    def __str__(self) -> str:
        return f"{self.wrap}, {self.mode}" + (f", {self.micro} micro batches" if self.micro > 1 else "")


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp bucket view": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "ddp static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp layer": fsdp_layer,
    "fsdp model": fsdp_model,
}
MODES = ("implicit", "jfb", "phantom", "stochastic", "stochastic, each sample", "unroll")
CASES = [
    *(Case(wrap, mode) for wrap in ("ddp", "fsdp layer") for mode in MODES),
    *(Case(wrap, "implicit") for wrap in WRAPS if wrap not in ("ddp", "fsdp layer")),
    *(Case(wrap, "implicit", micro=2) for wrap in ("ddp", "fsdp layer")),
]


def without_sync(model: nn.Module, last: bool) -> Any:
    """No communication of gradients until the last micro batch."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model: nn.Module, batches: list[Tensor], micro: int = 1) -> dict[str, Any]:
    """A few steps: the gradients of each, and how much work the cell was."""
    (cell,) = (module for module in model.modules() if isinstance(module, Cell))
    record: dict[str, Any] = {"gradients": [], "evaluations": [], "products": []}
    for x in batches:
        cell.evaluations = cell.products = 0
        model.zero_grad()
        for index, part in enumerate(x.chunk(micro)):
            with without_sync(model, index == micro - 1):
                (model(part).square().sum() / x.numel()).backward()
        record["gradients"].append([whole(p.grad).clone() for p in model.parameters()])
        record["evaluations"].append(cell.evaluations)
        record["products"].append(cell.products)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return record


# What the processes do.


def worker(rank: int, folder: str) -> None:
    """Everything, in turn: starting a process takes longer than any of it."""
    torch.set_num_threads(1)
    imported = "torch.distributed.fsdp" in sys.modules
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    train_all(rank, folder)
    torch.save({"imported": imported, **try_sharded_cells(rank, folder)}, f"{folder}/trap{rank}.pt")
    dist.destroy_process_group()


def train_all(rank: int, folder: str) -> None:
    """Every case, in turn."""
    for case in CASES:
        Path(folder, f"doing{rank}").write_text(str(case))
        batches = [rows(make_batch(step), rank, case.micro) for step in range(STEPS)]
        model = WRAPS[case.wrap](make_model(case.mode))
        torch.manual_seed(rank)  # default generators drift apart; the depths must not
        torch.save(train(model, batches, case.micro), f"{folder}/{case}{rank}.pt")


def rows(batch: Tensor, rank: int, micro: int) -> Tensor:
    """A process's part of the joint batch, repeated with another sign for a second micro batch."""
    part = batch[rank * SAMPLES : (rank + 1) * SAMPLES]
    return torch.cat([part * (-0.9) ** index for index in range(micro)])


def joint(batch: Tensor, micro: int) -> Tensor:
    """What all processes see together in a step."""
    return torch.cat([rows(batch, rank, micro) for rank in range(WORLD)])


SHARDED_CELLS = {  # the module to shard, and whether to free its parameters after forward
    "cell": (lambda layer: layer.cell, None),
    "cell, resharding": (lambda layer: layer.cell, True),
    "cell, not resharding": (lambda layer: layer.cell, False),
    "part of the cell": (lambda layer: layer.cell.inner, None),
}


def try_sharded_cells(rank: int, folder: str) -> dict[str, Any]:
    """Sharded cells: the error of each, and what the layer gives after the way out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu", (WORLD,))
    x = rows(make_batch(0), rank, 1)
    found: dict[str, Any] = {}
    for name, (part, reshard) in SHARDED_CELLS.items():
        for grad in (True, False):
            Path(folder, f"doing{rank}").write_text(f"{name}, grad {grad}")
            model = make_model("implicit")
            fully_shard(part(model[1]), mesh=mesh, reshard_after_forward=reshard)
            fully_shard(model, mesh=mesh)
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="sharded by itself") as error:
                model(x)
            found[f"{name}, grad {grad}"] = str(error.value)
    Path(folder, f"doing{rank}").write_text("layer")
    model = make_model("implicit")
    fully_shard(model[1], mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model[1], "solve")
    hidden = model[0](x).detach()
    with torch.no_grad():
        found["forward"], found["evaluations"] = model[1](hidden), model[1].cell.evaluations
    solution = model[1].solve(hidden)
    solution.value.sum().backward()
    found["solve"] = solution.value.detach()
    found["gradient"] = model[1].cell.inner.weight.grad.full_tensor()
    return found


def run(folder: Path) -> None:
    """Both processes to their end, or a failure and both killed."""
    context = mp.spawn(worker, args=(str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=0.2):
            if time.monotonic() > deadline:
                doing = [path.read_text() for path in sorted(folder.glob("doing*"))]
                pytest.fail(f"the processes hang, at {doing}")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they recorded, for every case."""
    path = tmp_path_factory.mktemp("distributed")
    run(path)
    return path


@pytest.fixture(scope="module")
def trapped(folder: Path) -> list[dict[str, Any]]:
    """What each process found out about sharded cells."""
    return [torch.load(folder / f"trap{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_averaged_gradients_are_those_of_one_process_on_the_joint_batch(
    folder: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = StochasticJFB._drawn_for_each

    def alike(mode: StochasticJFB, batch: int) -> tuple[list[int], list[int]]:
        """Every process draws the same for the samples that it has."""
        free, taped = drawn(mode, batch // WORLD)
        return free * WORLD, taped * WORLD

    monkeypatch.setattr(StochasticJFB, "_drawn_for_each", alike)
    batches = [joint(make_batch(step), case.micro) for step in range(STEPS)]
    alone = train(make_model(case.mode), batches)
    for rank in range(WORLD):
        found = torch.load(folder / f"{case}{rank}.pt", weights_only=True)
        assert len(found["gradients"]) == STEPS
        for ours, expected in zip(found["gradients"], alone["gradients"], strict=True):
            for a, b in zip(ours, expected, strict=True):
                assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_processes_took_different_numbers_of_steps(folder: Path, case: Case) -> None:
    """Else the tests above say nothing about waiting for one another."""
    first, second = (torch.load(folder / f"{case}{rank}.pt", weights_only=True) for rank in range(WORLD))
    if case.mode.startswith("stochastic"):  # drawn alike
        assert first["evaluations"] == second["evaluations"]
        return
    assert all(a != b for a, b in zip(first["evaluations"], second["evaluations"], strict=True))
    if case.mode == "implicit":
        assert all(a != b for a, b in zip(first["products"], second["products"], strict=True))


def test_the_random_depths_include_zero_steps_without_gradient() -> None:
    backward, _ = make_backward("stochastic")
    free = [(backward._draw(backward.no_grad), backward._draw(backward.grad))[0] for _ in range(STEPS)]
    assert 0 in free
    assert len(set(free)) > 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SHARDED_CELLS)
def test_a_cell_that_gathers_its_parameters_at_every_evaluation_is_refused(
    trapped: list[dict[str, Any]], name: str, grad: bool
) -> None:
    where = "cell.inner (FSDPLinear)" if name == "part of the cell" else "cell (FSDPCell)"
    for found in trapped:
        message = found[f"{name}, grad {grad}"]
        assert message.startswith("ImplicitLayer: the cell must not be sharded by itself")
        assert f"got FSDP on {where}" in message
        assert "call fully_shard on the ImplicitLayer" in message


def test_a_sharded_layer_can_be_evaluated_and_asked_for_its_solution(trapped: list[dict[str, Any]]) -> None:
    layers = [make_model("implicit") for _ in range(WORLD)]
    gradients = []
    for rank, (model, found) in enumerate(zip(layers, trapped, strict=True)):
        hidden = model[0](rows(make_batch(0), rank, 1)).detach()
        value = model[1](hidden)
        value.sum().backward()
        gradients.append(model[1].cell.inner.weight.grad)
        torch.testing.assert_close(found["forward"], value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["solve"], value.detach(), rtol=1e-9, atol=1e-12)
    assert trapped[0]["evaluations"] != trapped[1]["evaluations"]
    for found in trapped:
        torch.testing.assert_close(found["gradient"], (gradients[0] + gradients[1]) / 2, rtol=1e-6, atol=0)


def test_importing_the_library_does_not_import_fsdp(trapped: list[dict[str, Any]]) -> None:
    assert not any(found["imported"] for found in trapped)

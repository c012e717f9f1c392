"""Two processes on one machine train one model; averaged gradients are those of the joint batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deqlib import Anderson, Backward, ImplicitDifferentiation, ImplicitLayer, Picard, StochasticJFB, Stopping

WORLD, STEPS, SAMPLES, DIM = 2, 6, 3, 6


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        with torch.no_grad():
            self.inner.weight *= 0.5

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def make_backward(name: str) -> tuple[Backward, Any]:
    """A backward mode and the solver that goes with it."""
    if name == "stochastic":
        generator = torch.Generator().manual_seed(11)  # the same in every process
        return StochasticJFB(no_grad=(0, 2), grad=(1, 3), generator=generator), Picard()
    return ImplicitDifferentiation(stopping=Stopping(rtol=1e-12)), Anderson()


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    backward, solver = make_backward(name)
    layer = ImplicitLayer(
        Cell(), solver=solver, backward=backward, stopping=Stopping(rtol=1e-12), on_failure="raise"
    )
    return nn.Sequential(nn.Linear(4, DIM), layer, nn.Linear(DIM, 1)).double()


def make_batch(step: int) -> Tensor:
    """The joint batch; process r takes rows [r * SAMPLES, (r + 1) * SAMPLES)."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(WORLD * SAMPLES, 4, generator=generator, dtype=torch.float64)


def train(model: nn.Module, batches: list[Tensor]) -> list[list[Tensor]]:
    """A few steps; the gradients of each."""
    gradients = []
    for x in batches:
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return gradients


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for name in ("stochastic", "implicit"):
        batches = [make_batch(s)[rank * SAMPLES : (rank + 1) * SAMPLES] for s in range(STEPS)]
        model = DistributedDataParallel(make_model(name))
        torch.manual_seed(rank)  # default generators drift apart; the depths must not
        torch.save(train(model, batches), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left the gradients of every step, for both modes."""
    path = tmp_path_factory.mktemp("distributed")
    mp.spawn(worker, args=(str(path),), nprocs=WORLD)
    return path


@pytest.mark.parametrize("name", ["stochastic", "implicit"])
def test_averaged_gradients_are_those_of_one_process_on_the_joint_batch(folder: Path, name: str) -> None:
    alone = train(make_model(name), [make_batch(step) for step in range(STEPS)])
    for rank in range(WORLD):
        found = torch.load(folder / f"{name}{rank}.pt", weights_only=True)
        assert len(found) == STEPS
        for ours, expected in zip(found, alone, strict=True):
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_random_depths_include_zero_steps_without_gradient() -> None:
    backward, _ = make_backward("stochastic")
    free = [(backward._draw(backward.no_grad), backward._draw(backward.grad))[0] for _ in range(STEPS)]
    assert 0 in free
    assert len(set(free)) > 1

"""Long work holds no more in its end than at its beginning: solves, training, pictures."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from steadiness import Memory, told
from tiny_models import tiny_config, tiny_tokenizer, tiny_transformer
from torch import Tensor, nn

import deqlib
import viar
from deqlib import (
    JFB,
    Anderson,
    Auto,
    Backward,
    Broyden,
    ImplicitDifferentiation,
    ImplicitLayer,
    NewtonKrylov,
    NonConvergenceError,
    PhantomGradient,
    Picard,
    Reversible,
    ReversiblePicard,
    SharedInverse,
    Solver,
    StochasticJFB,
    Stopping,
    Unroll,
)
from viar import NextScaleTransformer, Sampling
from viar.data import TensorImages
from viar.training import TrainConfig, train_transformer

WARM = 0.2  # share of the work, at its beginning, in which memory is not looked at
KINDS: list[tuple[Callable[[], Solver], Callable[[], Backward]]] = [
    (Auto, ImplicitDifferentiation),
    (Picard, Unroll),
    (Anderson, JFB),
    (Broyden, SharedInverse),
    (NewtonKrylov, ImplicitDifferentiation),
    (ReversiblePicard, Reversible),
    (Picard, lambda: StochasticJFB(no_grad=(0, 2), grad=(1, 2))),
    (Anderson, lambda: PhantomGradient(steps=2)),
]
SHAPES = [(1, 2), (2, 3), (5, 3), (3, 2, 2)]
WAYS = ["backward", "plain", "warm", "recorded", "compact", "fails", "refused"]
STOPPING = Stopping(rtol=0.1, max_steps=5)


class Cell(nn.Module):
    """Contracts along the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.inner.weight, gain=0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def layers() -> list[tuple[ImplicitLayer, tuple[int, ...]]]:
    """A layer of every kind for every shape."""
    settings: dict[str, Any] = {"stopping": STOPPING, "on_failure": "ignore"}
    return [
        (ImplicitLayer(Cell(shape[-1]), solver=solver(), backward=backward(), **settings), shape)
        for solver, backward in KINDS
        for shape in SHAPES
    ]


def solve(layer: ImplicitLayer, x: Tensor, way: str) -> None:
    """One solve, of one of the `WAYS`."""
    if way == "fails":
        with pytest.raises(NonConvergenceError):
            deqlib.fixed_point(lambda z: z + 1, 0 * x, solver=Picard(), stopping=STOPPING, on_failure="raise")
    elif way == "refused":
        with pytest.raises(ValueError, match="shape"):
            deqlib.fixed_point(lambda z: z[..., :1], x)
    elif way == "warm":
        with torch.no_grad():
            first = layer.solve(x)
            layer.solve(x + 0.01, z0=first.value, state=first.state)
    else:
        recording = deqlib.record() if way == "recorded" else nullcontext()
        with recording, torch.set_grad_enabled(way != "plain"):
            value = layer.solve(x, compact=way == "compact").value
            if value.requires_grad:
                value.sum().backward()


def test_memory_does_not_grow_over_solves(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num, num_looks = times(2_000, 200_000), times(15, 60)
    memory, draw = Memory(), random.Random(0)
    torch.manual_seed(0)
    kinds = layers()
    for index in range(num):
        layer, shape = kinds[index % len(kinds)]
        solve(layer, torch.randn(shape), draw.choice(WAYS))
        if index >= WARM * num and index % (num // num_looks) == 0:
            memory.look()
    memory.check_objects(times(500, num // 10))
    growth = memory.growth(times(10, 2) / 100)
    what = "solves: every solver and backward mode, warm starts, records, failures"
    tally("memory", what, times=num, growth=told(growth))


def test_memory_does_not_grow_over_steps_of_training(
    tmp_path: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num, num_looks, taken, memory = times(200, 20_000), times(15, 60), 0, Memory()
    tokenizer, model = tiny_tokenizer(), NextScaleTransformer(tiny_config())

    def look(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken >= WARM * num and taken % (num // num_looks) == 0:
            memory.look()

    model.register_forward_pre_hook(look)
    pictures = TensorImages(torch.rand(24, 3, 6, 6) * 2 - 1, torch.arange(24) % 3)
    config = TrainConfig(
        steps=num,
        batch_size=4,
        save_every=times(1, 5),
        sample_every=num // times(2, 10),
        validate_every=num // times(4, 20),
        ema=0.9,
        trackers=(),
    )
    run = tmp_path / "run"
    train_transformer(model, tokenizer, pictures, run, config, held_out=pictures, console=Console(quiet=True))
    assert taken > num
    memory.check_objects(times(2_000, num // 10))
    growth = memory.growth(times(10, 2) / 100)
    what = "steps of training: states saved, held-out data measured, pictures drawn on the way"
    tally("memory", what, times=num, growth=told(growth))


def test_memory_does_not_grow_over_pictures_that_are_made_and_changed(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num, num_looks = times(100, 2_000), times(15, 60)
    model, tokenizer, memory = tiny_transformer(), tiny_tokenizer(), Memory()
    kept = torch.ones(6, 6)
    kept[3:] = 0
    for index in range(num):
        images = viar.generate(model, tokenizer, [index % 3], seed=index, iterations=index % 4 or None)
        viar.edit(model, tokenizer, images, kept, [index % 3], sampling=Sampling(seed=index))
        if index >= WARM * num and index % (num // num_looks) == 0:
            memory.look()
    memory.check_objects(times(200, num // 10))
    growth = memory.growth(times(10, 2) / 100)
    tally("memory", "pictures generated, and edited", times=num, growth=told(growth))

"""A tokenizer that takes patches of 2 x 2 pixels at a time beside one that takes every pixel, on MNIST.

Both bring 32 x 32 pixels to the same 8 x 8 vectors: one by a patch and two levels, as the recipe `mnist` has
it, the other by three levels, of which the first runs at full resolution. With patches training takes 2.5
times the steps, which is as long where a step takes 0.4 times as long; then steps of both are timed in turn.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console

from viar import Tokenizer
from viar.data import ImageData, TensorImages, load_data
from viar.training import TOKENIZERS, tokenizer_validation, train_tokenizer
from viar.training.losses import tokenizer_loss
from viar.training.optim import build_optimizer

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product
from ...measure import interleaved, milliseconds, ratio
from ...rows import by_contender, having
from ...show import COLORS, listing
from .models import descend

RECIPE = TOKENIZERS["mnist"]
CONTENDERS: dict[str, dict[str, Any]] = {
    "patch 1": {"patch": 1, "multipliers": (1, 2, 2)},
    "patch 2": {"patch": 2, "multipliers": (1, 2)},
}
LIMIT = 0.40  # of the time of a step at full resolution
MORE_STEPS = {"patch 1": 1.0, "patch 2": 1 / LIMIT}


def build(run: Run, steps: int, batch: int) -> Iterator[Row]:
    """PSNR and SSIM of held-out digits after training, and seconds of a step.

    Args:
        run: where steps are timed; training is on the device that accelerate picks.
        steps: of training at full resolution.
        batch: images a step.
    """
    data = load_data(RECIPE.data, RECIPE.model.image_side)
    if run.quick:
        data = replace(data, validation=TensorImages(*data.validation.__getitems__(range(8))))
    counts = {name: round(steps * more) for name, more in MORE_STEPS.items()}
    trained = {name: _trained(changes, data, counts[name], batch) for name, changes in CONTENDERS.items()}
    validation = {name: tokenizer_validation(each, data.validation) for name, each in trained.items()}
    steps_of = {name: _step(each.to(run.device), data, batch) for name, each in trained.items()}
    times = interleaved(steps_of, run.rounds)
    for name, each in trained.items():
        yield {
            "contender": name,
            "trained_steps": counts[name],
            "psnr": validation[name]["psnr"],
            "ssim": validation[name]["ssim"],
            "parameters": sum(p.numel() for p in each.parameters()),
            "seconds": times[name],
        }


def _trained(changes: dict[str, Any], data: ImageData, steps: int, batch: int) -> Tokenizer:
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(RECIPE.model, **changes))
    config = replace(RECIPE.train, steps=steps, seconds=None, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(file=io.StringIO())
        train_tokenizer(tokenizer, data.train, Path(folder), config, loss=RECIPE.loss, console=quiet)
    return tokenizer


def _step(tokenizer: Tokenizer, data: ImageData, batch: int) -> Callable[[], None]:
    """A step of training without revival."""
    tokenizer.train()
    device = tokenizer.quantizer.codebook.weight.device
    images = data.train.__getitems__(range(batch))[0].to(device)
    optimizer = build_optimizer(tokenizer, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01)
    step_loss = tokenizer_loss(tokenizer, kind=RECIPE.loss, revive_every=2, init_codebook=False, seed=0)

    def step() -> None:
        loss, _ = step_loss(tokenizer, [images], 0)
        descend(loss, tokenizer, optimizer, RECIPE.train.clip)

    return step


def bars(rows: list[Row]) -> list[Bar]:
    """What a patch saves, and what it costs, at the most steps."""
    names = ("time of a step, patch 2 / patch 1", "PSNR lost by patches, 2.5 times the steps, dB")
    if not rows:
        return [Bar(name, math.nan, limit) for name, limit in zip(names, (LIMIT, 0.0), strict=True)]
    found = by_contender(having(rows, steps=max(row["steps"] for row in rows)))
    full, patched = (found[name] for name in CONTENDERS)
    note = " against ".join(
        f"{row['psnr']:.2f} dB after {row['trained_steps']} steps" for row in (patched, full)
    )
    return [
        Bar(names[0], ratio(patched["seconds"], full["seconds"]), LIMIT, note),
        Bar(names[1], full["psnr"] - patched["psnr"], 0.0, note),
    ]


def table(rows: list[Row]) -> Table:
    """One line a contender and number of steps."""
    columns: dict[str, Callable[[Row], str]] = {
        "tokenizer": lambda row: str(row["contender"]),
        "steps": lambda row: str(row["trained_steps"]),
        "PSNR, dB": lambda row: f"{row['psnr']:.2f}",
        "SSIM": lambda row: f"{row['ssim']:.3f}",
        "parameters, thousands": lambda row: f"{row['parameters'] / 1e3:.0f}",
        "ms a step": lambda row: milliseconds(row["seconds"]),
    }
    return listing("training on MNIST, 32 x 32 pixels, held-out digits", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    rows = having(rows, steps=max(row["steps"] for row in rows))[::-1]
    names = [f"{row['contender']}, {row['trained_steps']:,} steps" for row in rows]
    quality, time = axes
    quality.barh(names, [row["psnr"] for row in rows], color=COLORS[: len(rows)])
    quality.set(xlabel="PSNR, dB")
    time.barh(names, [statistics.median(row["seconds"]) * 1e3 for row in rows], color=COLORS[: len(rows)])
    time.set(xlabel="ms a step")


CASE = Case(
    "tokenizer",
    "training of a tokenizer with patches of pixels and without",
    build,
    grid=product(steps=[400], batch=[32]),
    quick=product(steps=[2], batch=[4]),
    metrics={
        "trained_steps": Metric(better=None),
        "psnr": Metric("higher", noisy=True),
        "ssim": Metric("higher", noisy=True),
        "parameters": Metric(),
        "seconds": SECONDS,
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("held-out digits", "training"), columns=2, size=(4.6, 2.0)),
)

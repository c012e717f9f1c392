"""A training step of VIAR and VAR of one shape: images a second, and memory against iterations.

A step is forward pass, loss, backward pass and AdamW, under autocast to bfloat16, on tokens drawn at random.
VIAR's implicit block takes some iterations off the tape, with which memory does not grow, and some on it,
which are kept. Points are for a GPU and empty elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from matplotlib.axes import Axes

from viar.training.losses import transformer_loss
from viar.training.optim import build_optimizer

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Settings, Table
from ...measure import interleaved, peak_bytes, with_spread
from ...rows import having
from ...show import COLORS, curve, listing
from .models import descend, gigabytes, num_bytes, published, random_transformer

FLAT = 1.02  # most peak / least over all numbers of iterations off the tape
CLIP = 2.0  # of the norm of gradients, as in training


def build(run: Run, model: str, depth: int, batch: int, no_grad: int, grad: int) -> Iterator[Row]:
    """Seconds of a step and its peak.

    Args:
        run: where; no rows if the device is no GPU.
        model: VAR or VIAR.
        depth: D; the model is 64 D wide.
        batch: images.
        no_grad: VIAR's iterations off the tape.
        grad: those on it, which come after.
    """
    if run.device.type != "cuda" and not run.quick:
        return
    step, weights = training_step(run, model, depth, batch, no_grad, grad)
    step()  # makes the optimizer's moments, and sets up libraries
    peak = peak_bytes(step, run.device)
    times = interleaved({model: step}, run.rounds)
    yield {
        "contender": model,
        "state_bytes": weights,
        "peak_bytes": weights + peak,
        "seconds": times[model],
    }


def training_step(
    run: Run, model: str, depth: int, batch: int, no_grad: int, grad: int
) -> tuple[Callable[[], None], int]:
    """A step, and the bytes of weights and of the optimizer's two moments of each."""
    config = published(model, depth, run, no_grad=(no_grad, no_grad), grad=(max(grad, 1), max(grad, 1)))
    transformer = random_transformer(config, run.device).train().requires_grad_(True)
    optimizer = build_optimizer(transformer, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    step_loss = transformer_loss(None, seed=0)
    num_tokens = sum(side * side for side in config.sides)
    inputs = torch.randn(batch, num_tokens - config.sides[0] ** 2, config.code_channels, device=run.device)
    targets = torch.randint(config.codebook_size, (batch, num_tokens), device=run.device)
    labels = torch.arange(batch, device=run.device) % config.num_classes

    def step() -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            loss, _ = step_loss(transformer, (inputs, targets, labels), 1)  # one that is not logged
        descend(loss, transformer, optimizer, CLIP)

    trained = sum(p.nbytes for p in transformer.parameters())
    return step, num_bytes(transformer) + 2 * trained


def bars(rows: list[Row]) -> list[Bar]:
    """Memory against iterations of which one is on the tape."""
    peaks = {row["no_grad"] + 1: row["peak_bytes"] for row in having(rows, model="VIAR", grad=1)}
    flat = max(peaks.values()) / min(peaks.values()) if len(peaks) > 1 else math.nan
    note = ", ".join(f"{count}: {gigabytes(peak)} GB" for count, peak in sorted(peaks.items()))
    return [Bar("peak of a training step of VIAR over its iterations, one on the tape", flat, FLAT, note)]


def table(rows: list[Row]) -> Table:
    """One line a point."""

    def iterations(row: Row) -> str:
        return f"{row['no_grad']} + {row['grad']}" if row["model"] == "VIAR" else ""

    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: f"{row['model']}, depth {row['depth']}, batch {row['batch']}",
        "iterations off + on the tape": iterations,
        "images/s": lambda row: with_spread([row["batch"] / time for time in row["seconds"]]),
        "weights and moments, GB": lambda row: gigabytes(row["state_bytes"]),
        "peak, GB": lambda row: gigabytes(row["peak_bytes"]),
    }
    return listing("a training step, bfloat16 autocast", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    for color, grad in zip(COLORS, sorted({row["grad"] for row in rows}), strict=False):
        for model, style in (("VIAR", "o-"), ("VAR", "s")):
            chosen = having(rows, model=model, grad=grad)
            if chosen:
                label = f"VIAR, {grad} on the tape" if model == "VIAR" else "VAR"
                peak = partial(_gigabytes_of, "peak_bytes")
                curve(axis, chosen, "no_grad", peak, style, color=color, label=label)
    axis.set(xlabel="iterations off the tape", ylabel="peak of a training step, GB", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def _gigabytes_of(name: str, row: Row) -> float:
    return float(row[name]) / 1e9


def _points(depth: int, batch: int) -> list[Settings]:
    counts = [("VIAR", 5, 6), ("VAR", 0, 0), *(("VIAR", n - 1, 1) for n in (1, 11, 22)), ("VIAR", 10, 12)]
    return [
        {"model": model, "depth": depth, "batch": batch, "no_grad": no_grad, "grad": grad}
        for model, no_grad, grad in counts
    ]


CASE = Case(
    "training",
    "a training step: images a second, and memory against the iterations of VIAR",
    build,
    grid=_points(16, 32),
    quick=_points(4, 2)[:4],
    metrics={"state_bytes": Metric(), "peak_bytes": Metric(), "seconds": SECONDS},
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ["memory of training"]),
)

"""Training steps from tokens on disk, and from the images with the encoder in the loop.

Both contenders take the same batches of the same rows through the same transformer and optimiser. `images`
draws them as training does, changed or cut anew, and encodes them; `shards` reads what `write_shards` made of
them. All in one process, as training without workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from torch import Tensor

from viar import ExplicitTrunkConfig, ImplicitTrunkConfig, Tokenizer, TokenizerConfig, TransformerConfig
from viar.data import (
    AugmentedImages,
    Batch,
    BatchedDataset,
    EndlessBatches,
    ImageData,
    ImageFolder,
    TensorImages,
    TokenShards,
    from_rows,
    rows_of,
    tokenize,
    write_shards,
)
from viar.data.tokens import TokenBatch
from viar.model.config import TrunkConfig
from viar.training import TOKENIZERS
from viar.training.losses import transformer_loss
from viar.training.optim import build_optimizer

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product, worst_of
from ...measure import interleaved, ratio, with_spread
from ...rows import by_contender, grouped
from ...show import COLORS
from .models import descend, random_tokenizer, random_transformer

SLOWEST = 1 / 1.5  # seconds of an image from shards / with the encoder
STEPS = 4  # at a time
CLIP = 2.0  # of the norm of gradients, as in training
# Ladders of pictures of 32 x 32, with what the encoder's channels are multiplied by.
LADDERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "21 tokens": ((1, 2, 4), (1, 2, 2, 2)),
    "103 tokens": ((1, 2, 3, 5, 8), (1, 2, 2)),
}
TRUNKS: dict[str, TrunkConfig] = {
    "VAR": ExplicitTrunkConfig(),
    "VIAR": ImplicitTrunkConfig(num_pre=1, num_post=1, no_grad=(1, 1), grad=(2, 2)),
}


def build(run: Run, images_of: str, ladder: str, model: str, batch: int) -> Iterator[Row]:
    """Seconds of some training steps, and the bytes of a row.

    Args:
        run: where.
        images_of: "in memory", of 32 x 32 as MNIST's are, or "a folder" of PNG files of 256 x 192.
        ladder: of the tokenizer, by the name in `LADDERS`.
        model: VAR or VIAR, of depth 8 and width 64.
        batch: images a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        codec = random_tokenizer(_codec(ladder), run.device)
        source = SOURCES[images_of](Path(folder), 2 * batch)
        held = TensorImages(torch.zeros(1, 3, 32, 32), torch.zeros(1))
        shards = Path(folder, "tokens")
        write_shards(
            codec, ImageData(source, held, 10), shards, origin={}, crops=2, console=Console(quiet=True)
        )
        tokens = TokenShards(shards)
        steps = {
            "images": training(run, model, batch, source, codec, tokenize),
            "shards": training(run, model, batch, tokens, codec, from_rows),
        }
        times = interleaved(steps, run.rounds)
    for name, seconds in times.items():
        row_bytes = tokens.settings.dtype.itemsize if name == "shards" else 0
        yield {"contender": name, "num_images": STEPS * batch, "seconds": seconds, "row_bytes": row_bytes}


def training(
    run: Run,
    model: str,
    batch: int,
    data: BatchedDataset[Any],
    codec: Tokenizer,
    to_tokens: Callable[[Tokenizer, Tensor, Tensor], TokenBatch],
) -> Callable[[], None]:
    """So many steps on `data`, drawn as the training loop draws them."""
    config = TransformerConfig(
        depth=3 if run.quick else 8,
        width=16 if run.quick else 64,
        num_heads=4,
        sides=codec.config.sides,
        codebook_size=codec.config.codebook_size,
        code_channels=codec.config.code_channels,
        num_classes=10,
        drop_path=0.0,
        trunk=TRUNKS[model],
    )
    transformer = random_transformer(config, run.device).train().requires_grad_(True)
    optimizer = build_optimizer(transformer, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    step_loss = transformer_loss(partial(to_tokens, codec), seed=0)
    batches = iter(EndlessBatches(len(data), batch, seed=0, rows=True))

    def compute() -> None:
        for _ in range(STEPS):
            drawn = [part.to(run.device) for part in rows_of(data, next(batches), 0)]
            loss, _ = step_loss(transformer, drawn, 0)
            descend(loss, transformer, optimizer, CLIP)

    return compute


def _codec(ladder: str) -> TokenizerConfig:
    sides, multipliers = LADDERS[ladder]
    return replace(TOKENIZERS["digits"].model, sides=sides, codebook_size=256, multipliers=multipliers)


def _in_memory(folder: Path, count: int) -> BatchedDataset[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = TensorImages(torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1, torch.arange(count) % 10)
    return AugmentedImages(images, ["rotate", "scale", "shift"])


def _a_folder(folder: Path, count: int) -> BatchedDataset[Batch]:
    """Pictures without detail, as those of cameras mostly are: a file of noise would take longer to read."""
    random = np.random.default_rng(0)
    files = []
    for index in range(count):
        few = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        path = folder / f"{index}.png"
        few.resize((256, 192), Image.Resampling.BICUBIC).save(path)
        files.append((path, index % 10))
    return ImageFolder(files, 32, train=True)


SOURCES: dict[str, Callable[[Path, int], BatchedDataset[Batch]]] = {
    "in memory": _in_memory,
    "a folder": _a_folder,
}


def bars(rows: list[Row]) -> list[Bar]:
    """Time from shards over time with the encoder, where it gains least.

    Of pictures in a folder, which is what tokens are written down for. Small ones in memory, which are not
    read and hardly take an encoder, are in the table alone.
    """
    found = {
        _described(point[0]): _ratio(point)
        for point in grouped(rows, "images_of", "ladder", "model", "batch")
        if point[0]["images_of"] == "a folder"
    }
    return [worst_of("training from shards of a folder / with the encoder, time", found, SLOWEST)]


def _ratio(point: list[Row]) -> float:
    found = by_contender(point)
    return ratio(found["shards"]["seconds"], found["images"]["seconds"])


def table(rows: list[Row]) -> Table:
    """One line a point."""
    head = (
        "images, model",
        "batch",
        "encoder in the loop, images/s",
        "from shards, images/s",
        "times as many",
    )
    lines = []
    for point in grouped(rows, "images_of", "ladder", "model", "batch"):
        found, row = by_contender(point), point[0]
        rates = (
            with_spread([found[name]["num_images"] / time for time in found[name]["seconds"]])
            for name in ("images", "shards")
        )
        lines.append(
            (
                f"{row['images_of']}, {row['ladder']}, {row['model']}",
                str(row["batch"]),
                *rates,
                f"{1 / _ratio(point):.2f}",
            )
        )
    return Table("training from tokens on disk", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    points = grouped(rows, "images_of", "ladder", "model", "batch")
    for number, (name, color) in enumerate(zip(("images", "shards"), COLORS, strict=False)):
        found = [by_contender(point)[name] for point in points]
        rates = [row["num_images"] / median(row["seconds"]) for row in found]
        axis.barh([place + 0.4 * number for place in range(len(points))], rates, 0.4, color=color, label=name)
    axis.set_yticks([place + 0.2 for place in range(len(points))], [_described(point[0]) for point in points])
    axis.set(xlabel="images/s in training")
    axis.legend(frameon=False, fontsize=8)


def _described(row: Row) -> str:
    return f"{row['images_of']}, {row['ladder']}, {row['model']}"


CASE = Case(
    "shards",
    "training from tokens on disk against encoding in the loop",
    build,
    grid=product(images_of=SOURCES, ladder=LADDERS, model=("VIAR", "VAR"), batch=(64,)),
    quick=product(images_of=("a folder",), ladder=("21 tokens",), model=("VIAR",), batch=(4,)),
    metrics={"num_images": Metric(None), "row_bytes": Metric(), "seconds": SECONDS},
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ["training from tokens on disk"], size=(7.0, 3.6)),
)

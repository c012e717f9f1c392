"""Pictures of how a run is doing, drawn beside the training and without a trace in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch, BatchedDataset, save_grid
from ..generation.sampling import generate
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer

CLASSES, PER_CLASS = 10, 4  # most rows and the columns of a transformer's grid
HELD_OUT = 8  # pictures that a tokenizer is looked at by
NAME = re.compile(r"step-\d+\.png")


class Grid(NamedTuple):
    """Pictures to lay out row by row."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    columns: int
    row_names: Sequence[str] = ()  # written beside the rows


Draw = Callable[[nn.Module], Grid]  # of a model in evaluation mode, without gradient


def generated(tokenizer: Tokenizer) -> Draw:
    """A row of generated images for each class, the first ten where there are more, always of the same seed.

    Args:
        tokenizer: turns tokens into images; moved to the model's device.
    """

    def draw(model: nn.Module) -> Grid:
        assert isinstance(model, NextScaleTransformer)
        labels = torch.arange(min(model.config.num_classes, CLASSES)).repeat_interleave(PER_CLASS)
        return Grid(generate(model, tokenizer.to(model.pos_embed.device), labels), PER_CLASS)

    return draw


def reconstructed(held_out: BatchedDataset[Batch]) -> Draw:
    """Held-out images, evenly spread, each above what the tokenizer makes of it scale by scale.

    The first row has the images, row k below it their reconstructions from the first k scales.

    Args:
        held_out: at least one image.
    """
    count = min(len(held_out), HELD_OUT)
    images, _ = held_out.__getitems__([i * len(held_out) // count for i in range(count)])

    def draw(tokenizer: nn.Module) -> Grid:
        assert isinstance(tokenizer, Tokenizer)
        own = images.to(tokenizer.quantizer.codebook.weight.device)
        tokens, sides = tokenizer.encode(own), tokenizer.config.sides
        rows = [own, *(tokenizer.decode(tokens[: k + 1]) for k in range(len(sides)))]
        names = ["original", *(f"to {side} x {side}" for side in sides)]
        return Grid(torch.cat(rows).add(1).div(2), count, names)

    return draw


class RunSamples:
    """Writes `folder`/step-000100.png and so on, each whole or not there.

    Those of a run before are removed where this one starts at step 0.

    Args:
        folder: made when there is something to write.
        draw: what is on the pictures; `None` where there is nothing to draw.
        every: steps between two; 0 for none.
        step: where the run starts or goes on.
    """

    def __init__(self, folder: Path, draw: Draw | None, every: int, step: int) -> None:
        self.folder, self.draw, self.every = folder, draw, every
        if step == 0 and draw is not None and folder.is_dir():
            for path in folder.iterdir():
                if NAME.fullmatch(path.name):
                    path.unlink()

    def is_due(self, step: int) -> bool:
        """Whether something is to be drawn after `step` steps, by this process or by the main one."""
        return bool(self.every) and step % self.every == 0

    def look(self, model: nn.Module, step: int) -> None:
        """Draw after `step` steps, if it is time to."""
        if self.draw is None or not self.is_due(step):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with undisturbed(model):
            images, columns, row_names = self.draw(model)
            path = self.folder / f"step-{step:06d}.png"
            save_grid(images.float().cpu(), path, columns=columns, row_names=row_names)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards modes and PyTorch's generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training

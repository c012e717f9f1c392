"""Handwritten digits, read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...case import COUNT, SECONDS, Case, Metric, Picture, Row, Run, Table, product
from ...measure import seconds, with_spread
from .contenders import CONTENDERS, of_depth, parameters
from .show import by_depth, plot_by_depth
from .training import Batch, Reader, train

WIDTH, BATCH, RATE = 32, 64, 3e-3
TESTED = 360  # of 1,797, the first ones; the settings above were chosen with the last ones held out
# The checkpointed contender computes what the tied one does.
NAMES = tuple(name for name in CONTENDERS if "checkpointed" not in name)


def data() -> tuple[Batch, Batch]:
    """To train on and to test: rows of pixels in [-1, 1], (samples, 8, 8), and the digits (samples,)."""
    from sklearn.datasets import load_digits  # takes as long to import as all the rest together

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    digits = torch.tensor(found.target)
    return (images[TESTED:], digits[TESTED:]), (images[:TESTED], digits[:TESTED])


def build(run: Run, depth: int, updates: int, seeds: int) -> Iterator[Row]:
    """Accuracy of every contender by seed; contenders take turns within a seed."""
    (images, digits), (unseen, truth) = ([part.to(run.device) for part in half] for half in data())

    def batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(run.device)
        return images[chosen], digits[chosen]

    rows: dict[str, Row] = {name: {"accuracy": [], "seconds": []} for name in NAMES}
    for seed in range(seeds):
        for name, row in rows.items():
            torch.manual_seed(seed)
            model = Reader(of_depth(name, depth), 8, WIDTH, 10).to(run.device)
            work = partial(train, model, batch, _loss, updates=updates, seed=seed, rate=RATE)
            row["seconds"].append(seconds(work))
            row["parameters"] = parameters(model)
            with torch.no_grad():
                row["accuracy"].append(_accuracy(model(unseen), truth))
    for name, row in rows.items():
        yield {"contender": name, **row}


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """What the last row says counts: the others have to get there."""
    return cross_entropy(logits[:, -1], y)


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits[:, -1].argmax(-1) == y).float().mean())


def _table(rows: list[Row]) -> Table:
    def cell(row: Row) -> str:
        accuracy = with_spread([100 * a for a in row["accuracy"]])
        return f"{accuracy} / {with_spread(row['seconds'])}"

    title = f"% right of {TESTED} unseen digits / seconds of training, medians over seeds"
    return by_depth(rows, title, cell)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    plot_by_depth(axes[0], rows, "accuracy")
    axes[0].set(ylim=(None, 1.01))
    axes[0].axvline(8, color="black", linewidth=0.7, linestyle=":")
    axes[0].legend(frameon=False, fontsize=7)
    plot_by_depth(axes[1], rows, "seconds")
    plot_by_depth(axes[2], rows, "parameters")
    for axis in axes[1:]:
        axis.set(yscale="log")


CASE = Case(
    "digits",
    "accuracy on handwritten digits, eight rows of pixels of which the last must tell the digit",
    build,
    grid=product(depth=(1, 2, 4, 8, 16), updates=(300,), seeds=(3,)),
    quick=product(depth=(1, 4), updates=(10,), seeds=(1,)),
    metrics={
        "accuracy": Metric("higher", noisy=True),
        "seconds": SECONDS,
        "parameters": COUNT,
    },
    table=_table,
    picture=Picture(
        _paint, lambda rows: ("accuracy (8 rows: dotted)", "seconds of training", "parameters"), columns=3
    ),
)

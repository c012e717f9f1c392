"""The equilibrium cache against one an iteration, on the trained digits: same images, same class?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from torch import Tensor

import viar
from viar.evaluation import balanced_labels, class_consistency

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...show import COLORS
from .models import DIGITS_SAMPLING, Trained, trained_digits

JUDGED_FROM = 3  # iterations
LIMITS = {"differing": 0.05, "class": 0.01}
KINDS = ("equilibrium", "iterate")


def build(run: Run, iterations: int, per_class: int, batch: int = 250) -> Iterator[Row]:
    """Share of images whose 8-bit pixels differ, and the class consistency with each cache.

    Args:
        run: where.
        iterations: at every scale.
        per_class: images of each class.
        batch: images at a time; has no influence.
    """
    trained = trained_digits(run)
    labels = balanced_labels(trained.data.num_classes, per_class).to(trained.device)
    made = {kind: _images(trained, labels, iterations, kind, batch) for kind in KINDS}
    ours, theirs = (eight_bit(images).flatten(1) for images in made.values())
    yield {
        "images": len(labels),
        "differing": float((ours != theirs).any(1).float().mean()),
        **{kind: class_consistency(trained.classifier, images, labels) for kind, images in made.items()},
    }


def _images(trained: Trained, labels: Tensor, iterations: int, kind: str, batch: int) -> Tensor:
    starts = range(0, len(labels), batch)
    pieces = [
        viar.generate(
            trained.viar,
            trained.tokenizer,
            labels[start : start + batch],
            iterations=iterations,
            first_index=start,
            cache=kind,
            **DIGITS_SAMPLING,
        )
        for start in starts
    ]
    return torch.cat(pieces)


def eight_bit(images: Tensor) -> Tensor:
    """As a PNG holds them."""
    return images.mul(255).round().byte()


def bars(rows: list[Row]) -> list[Bar]:
    """The worst number of iterations decides."""
    judged = {row["iterations"]: row for row in rows if row["iterations"] >= JUDGED_FROM}
    differing = {n: row["differing"] for n, row in judged.items()}
    classes = {n: abs(row["equilibrium"] - row["iterate"]) for n, row in judged.items()}
    where = f", worst of {min(judged)} to {max(judged)} iterations" if judged else ""
    return [
        Bar(
            f"digits that differ between caches{where}",
            max(differing.values(), default=math.nan),
            LIMITS["differing"],
            _listed(differing),
        ),
        Bar(
            f"class consistency, difference between caches{where}",
            max(classes.values(), default=math.nan),
            LIMITS["class"],
            _listed(classes),
        ),
    ]


def _listed(values: dict[int, float]) -> str:
    return ", ".join(f"{n}: {value:.3g}" for n, value in values.items())


def table(rows: list[Row]) -> Table:
    """One line a number of iterations."""
    lines = [
        (
            str(row["iterations"]),
            f"{1 - row['differing']:.3f}",
            f"{row['equilibrium']:.3f}",
            f"{row['iterate']:.3f}",
        )
        for row in rows
    ]
    head = ("iterations", "identical", "class consistency", "with the iterate cache")
    return Table(f"equilibrium cache / a set an iteration, {rows[0]['images']} digits", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    counts = [row["iterations"] for row in rows]
    same, classes = axes
    same.plot(counts, [1 - row["differing"] for row in rows], "o-", color=COLORS[0])
    same.axhline(1 - LIMITS["differing"], color="grey", linewidth=0.8, linestyle=":")
    for kind, color, style in zip(KINDS, (COLORS[0], COLORS[6]), ("o-", "s--"), strict=True):
        classes.plot(counts, [row[kind] for row in rows], style, color=color, label=f"{kind} cache")
    classes.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set(xlabel="iterations a scale", xticks=counts)


CASE = Case(
    "digits",
    "one set of keys and values against one an iteration: same images of the trained digits?",
    build,
    grid=product(iterations=range(1, 11), per_class=[100]),
    quick=product(iterations=[1, 3], per_class=[1]),
    metrics={
        "differing": Metric(),
        "equilibrium": Metric("higher"),
        "iterate": Metric("higher"),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("share of images that are the same", "class consistency")),
)

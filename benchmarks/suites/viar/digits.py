"""The equilibrium cache against one an iteration, on the trained digits: same images, same class?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from matplotlib.axes import Axes
from torch import Tensor

from viar.evaluation import balanced_labels, class_consistency

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...show import COLORS, curve, listing
from .models import trained_digits

JUDGED_FROM = 3  # iterations
LIMITS = {"differing": 0.05, "class": 0.01}
KINDS = ("equilibrium", "iterate")


def build(run: Run, iterations: int, per_class: int) -> Iterator[Row]:
    """Share of images whose 8-bit pixels differ, and the class consistency with each cache.

    Args:
        run: where.
        iterations: at every scale.
        per_class: images of each class.
    """
    trained = trained_digits(run)
    labels = balanced_labels(trained.data.num_classes, per_class).to(trained.device)
    made = {
        kind: trained.images(trained.samples(trained.viar, labels, iterations=iterations, cache=kind))
        for kind in KINDS
    }
    ours, theirs = (eight_bit(images).flatten(1) for images in made.values())
    yield {
        "images": len(labels),
        "differing": float((ours != theirs).any(1).float().mean()),
        **{kind: class_consistency(trained.classifier, images, labels) for kind, images in made.items()},
    }


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
    columns: dict[str, Callable[[Row], str]] = {
        "iterations": lambda row: str(row["iterations"]),
        "identical": lambda row: f"{1 - row['differing']:.3f}",
        "class consistency": lambda row: f"{row['equilibrium']:.3f}",
        "with the iterate cache": lambda row: f"{row['iterate']:.3f}",
    }
    return listing(f"equilibrium cache / a set an iteration, {rows[0]['images']} digits", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    same, classes = axes
    curve(same, rows, "iterations", lambda row: 1 - row["differing"], color=COLORS[0])
    same.axhline(1 - LIMITS["differing"], color="grey", linewidth=0.8, linestyle=":")
    for kind, color, style in zip(KINDS, (COLORS[0], COLORS[6]), ("o-", "s--"), strict=True):
        curve(classes, rows, "iterations", kind, style, color=color, label=f"{kind} cache")
    classes.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set(xlabel="iterations a scale", xticks=[row["iterations"] for row in rows])


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

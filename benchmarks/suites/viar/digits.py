"""The equilibrium cache against one an iteration, on the trained digits: same images, same class?"""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import viar
from viar.evaluate import balanced_labels, class_consistency

from ...report import Bar
from .models import DIGITS_SAMPLING, Trained

COUNTS = tuple(range(1, 11))
JUDGED_FROM = 3  # iterations
LIMITS = {"differing": 0.05, "class": 0.01}


def measure(
    trained: Trained, per_class: int = 100, counts: tuple[int, ...] = COUNTS, batch: int = 250
) -> dict[int, dict[str, float]]:
    """By iterations: share of images whose 8-bit pixels differ, and the class consistency of both caches."""
    labels = balanced_labels(trained.data.num_classes, per_class).to(trained.device)
    rows = {}
    for n in track(counts, "digits"):
        made = {kind: _images(trained, labels, n, kind, batch) for kind in ("equilibrium", "iterate")}
        ours, theirs = (eight_bit(images).flatten(1) for images in made.values())
        rows[n] = {
            "images": len(labels),
            "differing": float((ours != theirs).any(1).float().mean()),
            **{kind: class_consistency(trained.classifier, images, labels) for kind, images in made.items()},
        }
    return rows


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


def bars(rows: dict[int, dict[str, float]]) -> list[Bar]:
    """The worst number of iterations decides."""
    judged = {n: row for n, row in rows.items() if n >= JUDGED_FROM}
    differing = {n: row["differing"] for n, row in judged.items()}
    classes = {n: abs(row["equilibrium"] - row["iterate"]) for n, row in judged.items()}
    where = f", worst of {min(judged)} to {max(judged)} iterations"
    return [
        Bar(
            f"digits that differ between caches{where}",
            max(differing.values()),
            LIMITS["differing"],
            _listed(differing),
        ),
        Bar(
            f"class consistency, difference between caches{where}",
            max(classes.values()),
            LIMITS["class"],
            _listed(classes),
        ),
    ]


def _listed(values: dict[int, float]) -> str:
    return ", ".join(f"{n}: {value:.3g}" for n, value in values.items())


def table(rows: dict[int, dict[str, float]]) -> Table:
    """One line a number of iterations."""
    shown = Table(title="equilibrium cache / a set an iteration, trained digits")
    for column in ("iterations", "identical", "class consistency", "with the iterate cache"):
        shown.add_column(column, justify="right")
    for n, row in rows.items():
        shown.add_row(
            str(n), f"{1 - row['differing']:.3f}", f"{row['equilibrium']:.3f}", f"{row['iterate']:.3f}"
        )
    return shown


def record(rows: dict[int, dict[str, float]]) -> dict[str, Any]:
    """For JSON."""
    return {str(n): row for n, row in rows.items()}

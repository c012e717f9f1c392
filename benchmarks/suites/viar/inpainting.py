"""In-painting of held-out digits: with the centre hidden and the true class given, is the class kept?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from matplotlib.axes import Axes

import viar
from viar.data import all_batches
from viar.evaluation import class_consistency

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...rows import by_contender, grouped, having
from ...show import COLORS, curve
from .models import DIGITS_SAMPLING, trained_digits

LIMIT = 0.10
JUDGED_AT = 5  # iterations, the default of the trained model
EDITED, REAL, GREY = "centre made anew", "as they are", "centre left grey"


def build(run: Run, iterations: int, images: int) -> Iterator[Row]:
    """Shares of held-out digits in which the classifier sees the true class, as they are and edited.

    Args:
        run: where.
        iterations: of VIAR, which edits.
        images: at most so many; 185 are held out.
    """
    trained = trained_digits(run)
    real, labels = next(all_batches(trained.data.validation, images))
    real, labels = ((real + 1) / 2).to(trained.device), labels.to(trained.device)
    side = real.shape[-1]
    mask = torch.ones(side, side, device=trained.device)
    mask[side // 4 : side - side // 4, side // 4 : side - side // 4] = 0
    sampling = viar.Sampling(iterations=iterations, **DIGITS_SAMPLING)
    edited = viar.edit(trained.viar, trained.tokenizer, real, mask, labels, sampling=sampling)
    kept = mask.bool()
    found = {REAL: real, EDITED: edited, GREY: real.where(kept, 0.5)}
    for name, shown in found.items():
        yield {
            "contender": name,
            "class_consistency": class_consistency(trained.classifier, shown, labels),
            "kept_region_mean_error": float((shown - real)[..., kept].abs().mean()),
        }


def bars(rows: list[Row]) -> list[Bar]:
    """The share that loses its class."""
    found = by_contender(having(rows, iterations=JUDGED_AT))
    lost = {name: 1 - row["class_consistency"] for name, row in found.items()}
    note = f"real digits {lost[REAL]:.3f}, {GREY} {lost[GREY]:.3f}" if lost else ""
    return [Bar("in-painted digits not of their class", lost.get(EDITED, math.nan), LIMIT, note)]


def table(rows: list[Row]) -> Table:
    """One line a number of iterations."""
    lines = []
    for point in grouped(rows, "iterations"):
        found = by_contender(point)
        shares = [f"{found[name]['class_consistency']:.3f}" for name in (EDITED, REAL, GREY)]
        error = f"{found[EDITED]['kept_region_mean_error']:.4f}"
        lines.append((str(point[0]["iterations"]), *shares, error))
    head = ("iterations", EDITED, REAL, GREY, "mean error where kept, of 1")
    return Table("share of held-out digits seen as their class, a quarter hidden", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    for name, color, style in zip((EDITED, REAL, GREY), COLORS, ("o-", "--", ":"), strict=False):
        found = having(rows, contender=name)
        curve(axis, found, "iterations", "class_consistency", style, color=color, label=name)
    axis.axhline(1 - LIMIT, color="grey", linewidth=0.8)
    axis.set(xlabel="iterations a scale", ylabel="seen as their class")
    axis.legend(frameon=False, fontsize=8)


CASE = Case(
    "inpainting",
    "class of held-out digits whose centre was hidden and made anew",
    build,
    grid=product(iterations=[1, 2, 3, JUDGED_AT, 8], images=[185]),
    quick=product(iterations=[1, JUDGED_AT], images=[20]),
    metrics={
        "class_consistency": Metric("higher"),
        "kept_region_mean_error": Metric(noisy=True),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("held-out digits, a quarter hidden",), size=(5.2, 3.6)),
)

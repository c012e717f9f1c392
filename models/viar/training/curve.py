"""The picture of how the loss of a run went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing

TRAIN_COLOR, HELD_OUT_COLOR = "#9db4c0", "#d1495b"
# What held-out data is measured by, where the loss that training makes small has more terms.
ALIKE = {"squared_error": "mean squared error", "cross_entropy": "cross-entropy (nats)"}
WIDE_RANGE = 20  # ratio of the largest to the least loss above which the axis is logarithmic


def draw_curve(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Loss of training and of held-out data against steps, the best step marked.

    Of training it is the part of the loss that held-out data is measured by, where both are told.

    Nothing is drawn of less than two losses, or where matplotlib is not installed.

    Args:
        rows: of metrics.jsonl.
        path: PNG to write.
    """
    shown = next((name for name in ALIKE if any(name in row for row in rows)), "loss")
    train, held_out = (
        [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        for name in (shown, "validation_loss")
    )
    if len(train) < 2:
        return
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*train, strict=True), color=TRAIN_COLOR, linewidth=1, label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color=HELD_OUT_COLOR, markersize=3, label="held out")
        step, loss = min(held_out, key=lambda point: point[1])
        best = f"best: {loss:.4g} after step {step:.0f}"
        axis.axvline(step, color=HELD_OUT_COLOR, linestyle=":", linewidth=1, label=best)
    losses = [loss for _, loss in train + held_out if loss > 0]
    if losses and max(losses) > WIDE_RANGE * min(losses):
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=ALIKE.get(shown, "loss"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")

"""The knob on the trained digits: iterations against images a second, cache and evaluations."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from rich.table import Table
from torch import Tensor

import viar
from viar.evaluate import balanced_labels, class_consistency
from viar.iterations import Iterations
from viar.sampling import decode_images

from ...timing import interleaved
from .models import DIGITS_SAMPLING, Trained

SETTINGS: dict[str, Iterations | None] = {
    **{str(n): n for n in (1, 2, 3, 5, 8, 10)},
    "10 to 2": (10, 2),
    **{f"Adaptive {rtol:g}": viar.Adaptive(rtol=rtol) for rtol in (1e-1, 3e-2, 1e-2, 1e-3)},
    "VAR": None,
}
FEW = {name: SETTINGS[name] for name in ("1", "5", "Adaptive 0.1", "VAR")}


def measure(
    trained: Trained,
    rounds: int,
    per_class: int = 100,
    settings: dict[str, Iterations | None] = SETTINGS,
) -> dict[str, dict[str, Any]]:
    """By setting: images a second, cache bytes an image, evaluations of the implicit block, class."""
    labels = balanced_labels(trained.data.num_classes, per_class).to(trained.device)
    samples = {name: partial(_sample, trained, labels, chosen) for name, chosen in settings.items()}
    times = interleaved(samples, rounds)
    rows = {}
    for name, sample in samples.items():
        evaluations: list[int] = []
        hook = trained.viar.trunk.layer.cell.block.register_forward_hook(
            lambda *_, seen=evaluations: seen.append(1)
        )
        found = sample()
        hook.remove()
        images = decode_images(trained.tokenizer, found)
        rows[name] = {
            "images_per_second": len(labels) / statistics.median(times[name]),
            "cache_bytes": found.cache_bytes / len(labels),
            "evaluations": len(evaluations),
            "class_consistency": class_consistency(trained.classifier, images, labels),
            "seconds": times[name],
        }
    return rows


def _sample(trained: Trained, labels: Tensor, iterations: Iterations | None) -> viar.Sample:
    model = trained.var if iterations is None else trained.viar
    return viar.sample_tokens(model, trained.tokenizer, labels, iterations=iterations, **DIGITS_SAMPLING)


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a setting."""
    shown = Table(title="the knob, trained digits")
    for column in ("iterations", "images/s", "cache, kB an image", "evaluations", "class consistency"):
        shown.add_column(column, justify="left" if column == "iterations" else "right")
    for name, row in rows.items():
        shown.add_row(
            name,
            f"{row['images_per_second']:,.0f}",
            f"{row['cache_bytes'] / 1e3:.1f}",
            str(row["evaluations"]),
            f"{row['class_consistency']:.3f}",
        )
    return shown

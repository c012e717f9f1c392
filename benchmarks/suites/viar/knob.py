"""The knob on the trained digits: iterations, caches, types and batches, against speed, memory and quality.

Quality is the share of images whose class a classifier of real digits finds, and the Fréchet distance
between Gaussians fitted to that classifier's logits of generated and of real digits: a toy of the FID.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as cached
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

import viar
from viar.data import all_batches
from viar.evaluation import Moments, balanced_labels, class_consistency, frechet_distance
from viar.model.schedule import Iterations

from ...case import SECONDS, Case, Metric, Picture, Row, Run, Settings, Table, product
from ...measure import interleaved, ratio, with_spread
from ...rows import by_contender, grouped, having
from ...show import COLORS, curve
from .models import DTYPES, Trained, trained_digits, written

ADAPTIVE = {f"Adaptive {rtol:g}": viar.Adaptive(rtol=rtol) for rtol in (1e-1, 3e-2, 1e-2, 1e-3)}
POINT = ("iterations", "cache", "dtype", "batch")


def build(
    run: Run, iterations: int | str | list[int], cache: str, dtype: str, batch: int, per_class: int
) -> Iterator[Row]:
    """VIAR so set, and VAR in the same type and batch.

    Args:
        run: where.
        iterations: a count, those of the first scale and the last, or a name of `ADAPTIVE`.
        cache: of VIAR, "equilibrium" or "iterate".
        dtype: of the trunk's weights and the decoder's.
        batch: images that are timed.
        per_class: images of each class that are judged.
    """
    real = real_logits(trained_digits(run))
    trained = _prepared(trained_digits(run), dtype)
    samplers: dict[str, Callable[[Tensor], list[viar.Sample]]] = {
        "VIAR": partial(trained.samples, trained.viar, iterations=_schedule(iterations), cache=cache),
        "VAR": partial(trained.samples, trained.var, iterations=None, cache="equilibrium"),
    }
    num_classes = trained.data.num_classes
    few = (torch.arange(batch) % num_classes).to(trained.device)
    times = interleaved({name: partial(sample, few) for name, sample in samplers.items()}, run.rounds)
    labels = balanced_labels(num_classes, per_class).to(trained.device)
    for name, sample in samplers.items():
        with _evaluations(trained.viar) as evaluated:
            samples = sample(labels)
        images = trained.images(samples)
        with torch.no_grad():
            logits = trained.classifier(images * 2 - 1)
        yield {
            "contender": name,
            "seconds": times[name],
            "cache_bytes": sum(found.cache_bytes for found in samples) / len(labels),
            "evaluations": sum(evaluated) / (2 * len(labels)),  # guided: a row with its class, one without
            "class_consistency": class_consistency(trained.classifier, images, labels),
            "frechet": frechet_distance(Moments.of(logits), Moments.of(real)),
        }


def _prepared(trained: Trained, dtype: str) -> Trained:
    if dtype == "float32":
        return trained
    changed = copy.deepcopy(trained)
    for model in (changed.viar, changed.var):
        viar.prepare_inference(model, changed.tokenizer, dtype=DTYPES[dtype])
    return changed


def _schedule(iterations: int | str | list[int]) -> Iterations:
    if isinstance(iterations, str):
        return ADAPTIVE[iterations]
    if isinstance(iterations, list):
        first, last = iterations
        return first, last
    return iterations


@contextmanager
def _evaluations(model: viar.NextScaleTransformer) -> Iterator[list[int]]:
    """Rows of every call of the implicit block."""
    rows: list[int] = []
    trunk: Any = model.trunk
    hook = trunk.layer.cell.block.register_forward_hook(
        lambda block, inputs, output: rows.append(len(output))
    )
    try:
        yield rows
    finally:
        hook.remove()


@cached
@torch.no_grad()
def real_logits(trained: Trained) -> Tensor:
    """The classifier's, of all real digits."""
    found = [
        trained.classifier(images.to(trained.device))
        for part in (trained.data.train, trained.data.validation)
        for images, _ in all_batches(part, 512)
    ]
    return torch.cat(found)


def table(rows: list[Row]) -> Table:
    """One line a setting; VAR's class consistency and distance are in its own lines, once a type."""
    lines, seen = [], set()
    for point in grouped(rows, *POINT):
        found = by_contender(point)
        if (key := (found["VAR"]["dtype"], found["VAR"]["batch"])) not in seen:
            seen.add(key)
            lines.append(_line("VAR", found["VAR"], ""))
        setting = written(found["VIAR"]["iterations"])
        faster = ratio(found["VAR"]["seconds"], found["VIAR"]["seconds"])
        lines.append(_line(setting, found["VIAR"], f"{faster:.2f}"))
    head = ("iterations", "cache", "type", "batch", "images/s", "x VAR", "cache, kB an image", "evaluations")
    return Table("the knob, digits", (*head, "class consistency", "Fréchet distance"), lines)


def _line(name: str, row: Row, faster: str) -> tuple[str, ...]:
    return (
        name,
        row["cache"] if row["contender"] == "VIAR" else "",
        row["dtype"],
        str(row["batch"]),
        with_spread([row["batch"] / t for t in row["seconds"]]),
        faster,
        f"{row['cache_bytes'] / 1e3:.1f}",
        f"{row['evaluations']:.1f}",
        f"{row['class_consistency']:.3f}",
        f"{row['frechet']:.3f}",
    )


def _rate(row: Row) -> float:
    """Images a second."""
    rate: float = row["batch"] / statistics.median(row["seconds"])
    return rate


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    batch = statistics.mode(row["batch"] for row in rows)
    usual = [row for row in rows if _is_usual(row, "cache", "dtype") and row["batch"] == batch]
    solved, var = having(usual, contender="VIAR"), having(usual, contender="VAR")
    groups = {
        "a count": [row for row in solved if isinstance(row["iterations"], int)],
        "first to last": [row for row in solved if isinstance(row["iterations"], list)],
        "Adaptive": [row for row in solved if isinstance(row["iterations"], str)],
    }
    figures: list[Callable[[Row], float]] = [
        _rate,
        lambda row: row["class_consistency"],
        lambda row: row["frechet"],
    ]
    for axis, figure in zip(axes, figures, strict=False):
        for (name, found), color in zip(groups.items(), (COLORS[0], COLORS[3], COLORS[2]), strict=True):
            curve(axis, found, "evaluations", figure, color=color, label=f"VIAR, {name}")
        if var:
            level = statistics.median(map(figure, var))
            axis.axhline(level, color=COLORS[1], linestyle="--", label="VAR")
        axis.set(xlabel="evaluations of the implicit block, all scales")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    for name, color in (("VIAR", COLORS[0]), ("VAR", COLORS[1])):
        chosen = [row for row in rows if _is_usual(row, "iterations", "cache", "dtype")]
        curve(axes[3], having(chosen, contender=name), "batch", _rate, color=color, label=name)
    axes[3].set(xscale="log", yscale="log", xlabel="batch")
    axes[3].legend(frameon=False, fontsize=8)


_USUAL: Settings = {"iterations": 5, "cache": "equilibrium", "dtype": "float32", "batch": 250}


def _is_usual(row: Row, *names: str) -> bool:
    return all(row[name] == _USUAL[name] for name in names)


_COUNTS: list[int | list[int]] = [1, 2, 3, 5, 8, 10, [10, 2]]


def _grid(few: bool) -> list[Settings]:
    """Everything about the usual setting, one thing at a time."""
    per_class = {"per_class": 1 if few else 100}
    counts = [1, 5, [3, 1]] if few else _COUNTS
    names = ["Adaptive 0.1"] if few else list(ADAPTIVE)
    varied = [
        *product(iterations=[*counts, *names]),
        *product(cache=["iterate"], iterations=counts),
        *product(dtype=["bfloat16"], iterations=[5] if few else [1, 5]),
        *product(batch=[1] if few else [1, 10, 50, 1000]),
    ]
    usual = {**_USUAL, "batch": 20} if few else _USUAL
    return [{**usual, **changes, **per_class} for changes in varied]


CASE = Case(
    "knob",
    "iterations against images a second, cache, evaluations and quality, trained digits",
    build,
    grid=_grid(False),
    quick=_grid(True),
    metrics={
        "seconds": SECONDS,
        "cache_bytes": Metric(),
        "evaluations": Metric(),
        "class_consistency": Metric("higher"),
        "frechet": Metric(noisy=True),
    },
    table=table,
    picture=Picture(
        _paint,
        lambda rows: ("images/s", "class consistency", "Fréchet distance", "images/s, 5 iterations"),
        size=(4.4, 3.4),
    ),
)

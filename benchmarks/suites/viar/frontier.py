"""The frontier: one VIAR, set to many costs at inference, and a VAR of its own training for each cost.

All learn from the same tokens of MNIST in as many steps. Quality is the Fréchet distance to the training
pictures in the features of the data's judge (see `viar.evaluation.judge`), which has the distance of held-out
pictures beside it, and the judge's share of images of the class that was asked for.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

import viar
from viar import ImplicitTrunkConfig, NextScaleTransformer
from viar.data import ImageData, load_data
from viar.evaluation import Classifier, Reference, balanced_labels, data_reference, judge
from viar.generation.sampling import decode_images
from viar.model.schedule import Adaptive, Budget, Iterations
from viar.training import TRANSFORMERS, TransformerRecipe

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product
from ...measure import interleaved, peak_bytes, with_spread
from ...rows import distinct, grouped
from ...show import COLORS
from ..recipes.running import FOLDER, Material, material_of, trained_by
from .models import AT_ONCE, DIGITS_SAMPLING, num_bytes

DATA = "mnist"
DEPTH = 12  # of the recipes
DEPTHS = [4, 5, 6, 8, DEPTH]  # of the VARs
TIMED = 50  # images of a batch whose time and memory are taken
MOST_LOST = 2  # of five VARs, how many VIAR may be behind


@dataclass(frozen=True)
class Setting:
    """How VIAR is sampled."""

    kind: str  # of the curve that it is a point of
    iterations: Iterations
    cache: str = "equilibrium"


SETTINGS: dict[str, Setting] = {
    **{str(n): Setting("a count", n) for n in (1, 2, 3, 4, 5, 6, 9, 14, 20)},
    "6 to 1": Setting("falling", (6, 1)),
    "9 to 2": Setting("falling", (9, 2)),
    "1 to 6": Setting("rising", (1, 6)),
    "Adaptive 0.1": Setting("adaptive", Adaptive(rtol=1e-1)),
    "Adaptive 0.01": Setting("adaptive", Adaptive(rtol=1e-2)),
    "Budget 12": Setting("budget", Budget(evaluations=12)),
    "3, iterate": Setting("iterate cache", 3, "iterate"),
    "9, iterate": Setting("iterate cache", 9, "iterate"),
}
KINDS = list(dict.fromkeys(setting.kind for setting in SETTINGS.values()))


@cache
def _reference(quick: bool) -> Reference:
    """The training pictures, with the judge and the held-out pictures."""
    material = material_of(DATA, 0, quick)
    side = material.tokenizer.config.image_side
    if quick:
        torch.manual_seed(0)
        few = ImageData(material.train, material.held_out, 10)
        return data_reference(few, Classifier(10, side).eval())
    data = load_data(DATA, side)
    return data_reference(data, judge(data, cache=FOLDER / DATA))


def build(run: Run, seed: int, per_class: int) -> Iterator[Row]:
    """VIAR by every setting, and every VAR.

    Args:
        run: where.
        seed: of weights, batches and random depth, and of the images.
        per_class: images of each class that are judged; distances compare at equal counts alone.
    """
    material, reference = material_of(DATA, 0, run.quick), _reference(run.quick)
    assert reference.held_out is not None
    real = reference.quality(reference.held_out)
    material = replace(material, tokenizer=copy.deepcopy(material.tokenizer).to(run.device))
    labels = balanced_labels(10, per_class).to(run.device)
    contenders = _contenders(material, seed, run)
    few = labels[:: max(1, len(labels) // TIMED)][:TIMED]
    times = interleaved(
        {name: partial(found.sample, few, seed) for name, found in contenders.items()}, run.rounds
    )
    for name, found in contenders.items():
        images, evaluations, cache_bytes = found.judged(labels, seed)
        seen = reference.see(torch.split(images.cpu(), AT_ONCE), labels.cpu())
        quality = reference.quality(seen)
        count = found.sampling["iterations"]
        yield {
            "contender": name,
            "parameters": sum(p.numel() for p in found.model.parameters()),
            "loss": material.loss(found.model, count) if isinstance(count, int | None) else None,
            "evaluations": evaluations,
            "work": found.work(evaluations),
            "seconds": times[name],
            "cache_bytes": cache_bytes / len(labels),
            "bytes": num_bytes(found.model) + peak_bytes(partial(found.sample, few, seed), run.device),
            "frechet": quality.fid,
            "frechet_real": real.fid,
            "class_consistency": quality.class_consistency,
            "memorisation": quality.memorisation,
        }


@dataclass(frozen=True)
class Contender:
    """A trained model and how it is sampled."""

    model: NextScaleTransformer
    material: Material
    sampling: dict[str, Any]

    def sample(self, labels: Tensor, seed: int, first_index: int = 0, measure: bool = False) -> viar.Sample:
        """One image a label."""
        sampling = viar.Sampling(**DIGITS_SAMPLING, **self.sampling, seed=seed)
        return viar.sample_tokens(
            self.model, self.material.tokenizer, labels, sampling, first_index=first_index, measure=measure
        )

    def judged(self, labels: Tensor, seed: int) -> tuple[Tensor, float, int]:
        """Images in [0, 1], evaluations of a block for a token, and bytes of keys and values."""
        samples = [
            self.sample(labels[start : start + AT_ONCE], seed, start, measure=True)
            for start in range(0, len(labels), AT_ONCE)
        ]
        images = torch.cat([decode_images(self.material.tokenizer, sample) for sample in samples])
        evaluations = [self._evaluations(sample) for sample in samples]
        return images, statistics.mean(evaluations), sum(sample.cache_bytes for sample in samples)

    def _evaluations(self, sample: viar.Sample) -> float:
        trunk = self.model.config.trunk
        if not isinstance(trunk, ImplicitTrunkConfig):
            return float(self.model.config.depth)
        tokens = [scale.side**2 for scale in sample.scales]
        done = sum(
            (scale.evaluations or 0) * num for scale, num in zip(sample.scales, tokens, strict=True)
        ) / sum(tokens)
        return round(trunk.num_pre + trunk.num_post + done, 6)

    def work(self, evaluations: float) -> float:
        """Multiplications of a token with weights, in those of a plain block: 12 C^2.

        An evaluation of the cell has its projection besides, 4 C^2, and a scale the half of u, 2 C^2.
        """
        trunk = self.model.config.trunk
        if not isinstance(trunk, ImplicitTrunkConfig):
            return evaluations
        return evaluations + (evaluations - trunk.num_pre - trunk.num_post) / 3 + 1 / 6


def _contenders(material: Material, seed: int, run: Run) -> dict[str, Contender]:
    found = {}
    for depth in DEPTHS:
        var = trained_by(recipe_of("VAR", depth), material, f"var-d{depth}", seed=seed, run=run).model
        found[f"VAR, {depth} blocks"] = Contender(var.to(run.device), material, {"iterations": None})
    model = trained_by(recipe_of("VIAR"), material, f"viar-d{DEPTH}", seed=seed, run=run).model.to(run.device)
    for name, setting in SETTINGS.items():
        sampling = {"iterations": setting.iterations, "cache": setting.cache}
        found[f"VIAR, {name}"] = Contender(model, material, sampling)
    return found


def recipe_of(model: str, depth: int = DEPTH) -> TransformerRecipe:
    """That of MNIST for VIAR, or for a VAR of some depth, whose drop path is that of the depth."""
    recipe = TRANSFORMERS[f"{DATA}-{model.lower()}-d{DEPTH}"]
    return replace(recipe, model=replace(recipe.model, depth=depth, drop_path=None))


def bars(rows: list[Row]) -> list[Bar]:
    """Medians over seeds decide."""
    middle = {name: _median(found) for name, found in _by_name(rows).items()}
    vars_, viars = ({n: m for n, m in middle.items() if n.startswith(kind)} for kind in ("VAR,", "VIAR,"))
    return [
        _lost("evaluations", vars_, viars, "evaluations"),
        _lost("peak memory", vars_, viars, "bytes"),
    ]


def _lost(cost: str, vars_: dict[str, Row], viars: dict[str, Row], name: str) -> Bar:
    """VARs that have a smaller distance than VIAR at no more than their cost."""
    behind = []
    for var, theirs in vars_.items():
        there = [ours["frechet"] for ours in viars.values() if ours[name] <= theirs[name]]
        if not there:
            behind.append(f"{var} (no VIAR there)")
        elif min(there) > theirs["frechet"]:
            behind.append(f"{var} ({min(there) / theirs['frechet']:.2f} x)")
    label = f"VARs with a smaller distance than VIAR at their {cost}, of {len(vars_)}"
    return Bar(label, len(behind), MOST_LOST, "; ".join(behind))


def _by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return {found[0]["contender"]: found for found in grouped(rows, "contender")}


def _median(rows: list[Row]) -> Row:
    """Of every figure over seeds."""
    names = ("evaluations", "bytes", "frechet")
    return {name: statistics.median(row[name] for row in rows) for name in names}


def table(rows: list[Row]) -> Table:
    """One line a contender: the mean over seeds, and how far seeds are from it."""
    head = (
        "model", "evaluations of a block", "work, in blocks", "parameters", "loss", "Fréchet distance",
        "of real pictures", "class consistency", "memorisation", "images/s", "peak MB, 50 images",
        "cache, kB an image",
    )  # fmt: skip
    lines = []
    for name, found in _by_name(rows).items():
        lines.append(
            (
                name,
                f"{statistics.mean(row['evaluations'] for row in found):.1f}",
                f"{statistics.mean(row['work'] for row in found):.1f}",
                f"{found[0]['parameters']:,}",
                _spread(found, "loss", 4),
                _spread(found, "frechet", 2),
                _spread(found, "frechet_real", 2),
                _spread(found, "class_consistency", 3),
                _spread(found, "memorisation", 2),
                with_spread([TIMED / t for row in found for t in row["seconds"]]),
                f"{statistics.mean(row['bytes'] for row in found) / 1e6:.1f}",
                f"{statistics.mean(row['cache_bytes'] for row in found) / 1e3:.1f}",
            )
        )
    seeds = len(distinct(rows, "seed"))
    return Table(f"MNIST, {recipe_of('VIAR').train.steps:,} steps each, {seeds} seeds", head, lines)


def _spread(rows: list[Row], name: str, digits: int) -> str:
    """Mean, and the largest distance of a seed from it."""
    values = [row[name] for row in rows]
    if None in values:
        return ""
    mean = statistics.mean(values)
    apart = max(abs(value - mean) for value in values)
    return f"{mean:.{digits}f}" + (f" ± {apart:.{digits}f}" if len(values) > 1 else "")


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    columns: list[tuple[str, Callable[[Row], float]]] = [
        ("work for a token, in blocks", lambda row: row["work"]),
        ("peak memory of 50 images, MB", lambda row: row["bytes"] / 1e6),
    ]
    for axis, (label, cost) in zip(axes, columns, strict=True):
        _points(axis, _of_kind(rows, "VAR"), cost, "VAR, one training a point", COLORS[1], "s-")
        for kind, color in zip(KINDS, (COLORS[0], *COLORS[2:]), strict=False):
            chosen = [f"VIAR, {name}" for name, setting in SETTINGS.items() if setting.kind == kind]
            found = [row for row in rows if row["contender"] in chosen]
            style = "o-" if kind == "a count" else "o"
            _points(axis, found, cost, f"VIAR, {kind}", color, style)
        level = statistics.mean(row["frechet_real"] for row in rows)
        axis.axhline(level, color=COLORS[6], linestyle=":", label="held-out pictures")
        axis.set(xlabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=7)


def _of_kind(rows: list[Row], model: str) -> list[Row]:
    """Rows of VAR or of VIAR."""
    return [row for row in rows if row["contender"].startswith(f"{model},")]


def _points(
    axis: Axes, rows: list[Row], cost: Callable[[Row], float], label: str, color: str, style: str
) -> None:
    """Median over seeds with a bar from the least to the most."""
    points = []
    for found in _by_name(rows).values():
        values = [row["frechet"] for row in found]
        middle = statistics.median(values)
        points.append(
            (statistics.median(map(cost, found)), middle, middle - min(values), max(values) - middle)
        )
    if not points:
        return
    points.sort()
    x, y, below, above = (list(column) for column in zip(*points, strict=True))
    axis.errorbar(
        x, y, [below, above], fmt=style, color=color, label=label, markersize=4, linewidth=1, capsize=2
    )


CASE = Case(
    "frontier",
    "one VIAR by its iterations against VARs of several depths, trained alike on MNIST: quality against cost",
    build,
    grid=product(seed=[0, 1, 2], per_class=[50]),  # as many images as are held out
    quick=product(seed=[0], per_class=[1]),
    metrics={
        "parameters": Metric(),
        "loss": Metric(noisy=True),
        "evaluations": Metric(noisy=True),
        "work": Metric(noisy=True),
        "seconds": SECONDS,
        "cache_bytes": Metric(),
        "bytes": Metric(),
        "frechet": Metric(noisy=True),
        "frechet_real": Metric(None, noisy=True),
        "class_consistency": Metric("higher", noisy=True),
        "memorisation": Metric(None, noisy=True),
    },
    table=table,
    bars=bars,
    picture=Picture(
        _paint,
        lambda rows: ("Fréchet distance by work", "by memory"),
        size=(5.2, 3.8),
    ),
)

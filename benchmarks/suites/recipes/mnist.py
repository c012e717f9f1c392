"""VIAR and VAR of one width on MNIST, trained alike: loss of held-out digits, parameters, memory, knob.

The two take as many steps of the same batches. A step of VIAR takes less time: "at equal time" sets it beside
a VAR that takes only as many steps, by a schedule of its own, as there is time for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

from matplotlib.axes import Axes

from viar import ImplicitTrunkConfig, NextScaleTransformer
from viar.data import TensorImages, TokenizedImages
from viar.model.config import TransformerConfig
from viar.training import TRANSFORMERS, TransformerRecipe

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Table, product, worst_of
from ...measure import interleaved, peak_bytes, ratio, with_spread
from ...rows import by_contender, grouped, having
from ...show import COLORS, listing
from ..viar.models import num_bytes
from .running import QUICK_IMAGES, Material, material_of, single_steps, trained

MODELS = ["VIAR", "VAR", "VAR, VIAR's time"]
COUNTS = [1, 2, 3, 4, 6, 10]
FEW, MANY = 1, 4  # iterations between which the knob is judged
LIMITS = {"steps": 1.01, "time": 1.0, "parameters": 0.45, "memory": 0.6, "knob": 0.96, "off the tape": 1.0}
NOISE = 1.002  # a rise of the loss over iterations that is none
TIMED = 8  # steps of a turn, with as many draws of random depth
TIMED_IMAGES = QUICK_IMAGES  # that they are taken with


def build(run: Run, steps: int, seed: int, model: str) -> Iterator[Row]:
    """One training.

    Args:
        run: where.
        steps: of VIAR and of VAR.
        seed: of weights, batches and random depth.
        model: VIAR, VAR, or "VAR, VIAR's time".
    """
    name = model.partition(",")[0]
    recipe = recipe_of(name)
    material = material_of(recipe.data, recipe.augment, run.quick)
    tokens = timing_tokens(material)
    times = step_seconds(run, tokens)
    taken = steps if model == name else round(steps * ratio(times["VIAR"], times["VAR"]))
    outcome = trained(recipe, material, name.lower(), seed=seed, steps=taken, run=run)
    is_viar = name == "VIAR"
    yield {
        "contender": model,
        "taken": taken,
        "seconds": times[name],
        "parameters": sum(p.numel() for p in outcome.model.parameters()),
        "loss": material.loss(outcome.model),
        "best_step": outcome.best_step,
        "curve": outcome.curve,
        "knob": material.knob(outcome.model, COUNTS) if is_viar else {},
        "step_bytes": deepest_step_bytes(recipe, tokens),
        "far_step_bytes": deepest_step_bytes(recipe, tokens, no_grad=100) if is_viar else None,
    }


def recipe_of(model: str) -> TransformerRecipe:
    """Of VIAR or VAR."""
    return TRANSFORMERS[f"mnist-{model.lower()}"]


def timing_tokens(material: Material) -> TokenizedImages:
    """Enough of them for steps that are measured."""
    few = range(TIMED_IMAGES)
    return TokenizedImages(material.tokenizer, TensorImages(*material.train.__getitems__(few)))


def step_seconds(run: Run, tokens: TokenizedImages) -> dict[str, list[float]]:
    """Seconds of a step of VIAR and of VAR, over draws of random depth."""
    takers = {}
    for name in ("VIAR", "VAR"):
        recipe = recipe_of(name)
        steps = single_steps(NextScaleTransformer(recipe.model), recipe, tokens, (run.rounds + 1) * TIMED)
        takers[name] = partial(_take, steps)
    return {name: [time / TIMED for time in found] for name, found in interleaved(takers, run.rounds).items()}


def _take(steps: Iterator[int]) -> None:
    for _ in range(TIMED):
        next(steps)


def deepest_step_bytes(recipe: TransformerRecipe, tokens: TokenizedImages, no_grad: int | None = None) -> int:
    """Weights, moments, gradients and the peak of the deepest step that training may draw.

    Args:
        recipe: of the model.
        tokens: to take the step with.
        no_grad: iterations off the tape; default the most that the recipe draws.
    """
    model = NextScaleTransformer(_deepest(recipe.model, no_grad))
    steps = single_steps(model, recipe, tokens, 2)
    next(steps)  # makes the moments
    moments = 2 * sum(p.nbytes for p in model.parameters())
    return num_bytes(model) + moments + peak_bytes(lambda: next(steps))


def _deepest(config: TransformerConfig, no_grad: int | None) -> TransformerConfig:
    trunk = config.trunk
    if not isinstance(trunk, ImplicitTrunkConfig):
        return config
    far = trunk.deepest if no_grad is None else trunk.with_depth(no_grad, trunk.grad[1])
    return replace(config, trunk=far)


def bars(rows: list[Row]) -> list[Bar]:
    """The worst seed decides."""
    runs = {_run(found[0]): by_contender(found) for found in grouped(rows, "steps", "seed")}
    whole = {name: found for name, found in runs.items() if {"VIAR", "VAR"} <= set(found)}

    def ratios(name: str, other: str = "VAR") -> dict[str, float]:
        return {
            run: found["VIAR"][name] / found[other][name] for run, found in whole.items() if other in found
        }

    viar = having(rows, contender="VIAR")
    fallen = {_run(row): row["knob"][str(MANY)] / row["knob"][str(FEW)] for row in viar}
    rises = {_run(row): max(_rises(row["knob"])) for row in viar}
    far = {_run(row): row["far_step_bytes"] / row["step_bytes"] for row in viar}
    return [
        worst_of("loss, VIAR / VAR, equal steps", ratios("loss"), LIMITS["steps"]),
        worst_of("loss, VIAR / VAR, equal time", ratios("loss", "VAR, VIAR's time"), LIMITS["time"]),
        worst_of("parameters, VIAR / VAR", ratios("parameters"), LIMITS["parameters"]),
        worst_of("memory of the deepest step, VIAR / VAR", ratios("step_bytes"), LIMITS["memory"]),
        worst_of(f"knob: loss with {MANY} iterations / with {FEW}", fallen, LIMITS["knob"]),
        worst_of("knob: loss with more iterations / with fewer", rises, NOISE),
        worst_of("memory of a step, 100 iterations off the tape / fewest", far, LIMITS["off the tape"]),
    ]


def _run(row: Row) -> str:
    return f"{row['steps']:,} steps, seed {row['seed']}"


def _rises(knob: dict[str, float]) -> list[float]:
    return [more / few for few, more in pairwise(knob.values())]


def table(rows: list[Row]) -> Table:
    """One line a training."""
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: f"{row['contender']}, seed {row['seed']}",
        "steps": lambda row: f"{row['taken']:,}",
        "s a step": lambda row: with_spread(row["seconds"]),
        "best loss": lambda row: f"{row['loss']:.4f}",
        "after step": lambda row: f"{row['best_step']:,}",
        "parameters": lambda row: f"{row['parameters']:,}",
        "deepest step, MB": lambda row: f"{row['step_bytes'] / 1e6:.1f}",
        **{f"loss, {count} it.": partial(knob_loss, count) for count in COUNTS},
    }
    return listing("MNIST, nats a token of held-out digits", rows, columns)


def knob_loss(count: int, row: Row) -> str:
    """Loss with so many iterations, in words."""
    return f"{row['knob'][str(count)]:.4f}" if row["knob"] else ""


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    losses, knob = axes
    rows = having(rows, steps=max(row["steps"] for row in rows))
    for color, model in zip(COLORS, MODELS, strict=False):
        for row in having(rows, contender=model):
            seconds = statistics.median(row["seconds"])
            label = model if row["seed"] == rows[0]["seed"] else None
            x, y = zip(*((seconds * step / 60, loss) for step, loss in row["curve"]), strict=True)
            losses.plot(x, y, color=color, label=label, linewidth=1)
    for row in having(rows, contender="VIAR"):
        knob.plot(
            [int(n) for n in row["knob"]], list(row["knob"].values()), "o-", color=COLORS[0], markersize=3
        )
    least = min(row["loss"] for row in rows)
    losses.set(xlabel="minutes of training", ylim=(least - 0.02, least + 0.4))
    losses.legend(frameon=False, fontsize=8)
    knob.set(xlabel="iterations", xticks=COUNTS)


CASE = Case(
    "mnist",
    "VIAR and VAR on MNIST, trained alike: loss at equal steps and equal time, parameters, memory, knob",
    build,
    grid=product(steps=[1000, 3000], seed=[0, 1, 2], model=MODELS),
    quick=product(steps=[1000], seed=[0], model=MODELS),
    metrics={
        "seconds": SECONDS,
        "parameters": Metric(),
        "loss": Metric(noisy=True),
        "best_step": Metric(None, noisy=True),
        "taken": Metric(None, noisy=True),
        "curve": Metric(None, noisy=True),
        "knob": Metric(None, noisy=True),
        "step_bytes": Metric(),
        "far_step_bytes": Metric(),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("loss of held-out digits, nats a token", "VIAR's by iterations")),
)

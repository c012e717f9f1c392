"""Which training gives the knob: VIAR of the digits by random depth and penalties.

Loss of held-out digits against iterations, how far the block is from standing still, and whether both caches
make the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from viar import ImplicitTrunkConfig, Sampling, sample_tokens
from viar.data import tokenize
from viar.evaluation import balanced_labels
from viar.training import TRANSFORMERS
from viar.training.health import NUM_SAMPLES, cell_health

from ...case import Case, Metric, Row, Run, Table, product
from ...show import listing
from .mnist import knob_loss
from .running import material_of, trained

COUNTS = [1, 2, 3, 4, 6, 10]
STEPS = 800
AUGMENT = 6
JUDGED_AT = 5  # iterations at which the caches are compared
TRAININGS: dict[str, dict[str, Any]] = {
    "0-2, 1-2, residual 2": {"no_grad": (0, 2), "grad": (1, 2), "residual_weight": 2.0},
    "0-3, 2-5": {"no_grad": (0, 3), "grad": (2, 5)},
    "0-3, 2-5, residual 0.1": {"no_grad": (0, 3), "grad": (2, 5), "residual_weight": 0.1},
    "0-3, 2-5, Jacobian 1": {"no_grad": (0, 3), "grad": (2, 5), "jacobian_weight": 1.0},
    "0-3, 2-3": {"no_grad": (0, 3), "grad": (2, 3)},
    "0-6, 1-6": {"no_grad": (0, 6), "grad": (1, 6)},
    "0-3, 2-5, residual 1": {"no_grad": (0, 3), "grad": (2, 5), "residual_weight": 1.0},
    "0-3, 2-5, Jacobian 0.1": {"no_grad": (0, 3), "grad": (2, 5), "jacobian_weight": 0.1},
    "0-2, 1-2": {"no_grad": (0, 2), "grad": (1, 2)},
}


def build(run: Run, training: str, per_class: int) -> Iterator[Row]:
    """One training.

    Args:
        run: where.
        training: a name of `TRAININGS`.
        per_class: images of each class made with either cache.
    """
    recipe = TRANSFORMERS["digits-viar"]
    trunk = recipe.model.trunk
    assert isinstance(trunk, ImplicitTrunkConfig)
    plain = {"residual_weight": 0.0, "jacobian_weight": 0.0}
    changed = replace(trunk, **{**plain, **TRAININGS[training]})
    recipe = replace(recipe, model=replace(recipe.model, trunk=changed), augment=AUGMENT)
    material = material_of(recipe.data, recipe.augment, run.quick)
    name = f"viar {training}".replace(",", "").replace(" ", "-").lower()
    model = trained(recipe, material, name, seed=0, steps=STEPS, run=run).model
    batch = tokenize(material.tokenizer, *material.held_out.__getitems__(range(NUM_SAMPLES)))
    labels = balanced_labels(recipe.model.num_classes, per_class)
    made = [
        sample_tokens(model, material.tokenizer, labels, Sampling(iterations=JUDGED_AT, cache=cache)).tokens
        for cache in ("equilibrium", "iterate")
    ]
    ours, theirs = (torch.cat(list(tokens), 1) for tokens in made)
    yield {
        "contender": training,
        "loss": material.loss(model),
        "knob": material.knob(model, COUNTS),
        **cell_health(model, batch, iterations=JUDGED_AT),
        "differing": float((ours != theirs).any(1).float().mean()),
    }


def table(rows: list[Row]) -> Table:
    """One line a training."""
    columns: dict[str, Callable[[Row], str]] = {
        "iterations off, on the tape, penalty": lambda row: row["contender"],
        **{str(count): partial(knob_loss, count) for count in COUNTS},
        f"residual at {JUDGED_AT}": lambda row: f"{row['residual']:.1e}",
        "spectral radius": lambda row: f"{row['spectral_radius']:.2f}",
        "images that differ between caches": lambda row: f"{row['differing']:.3f}",
    }
    return listing(f"held-out digits, nats a token by iterations, {STEPS:,} steps", rows, columns)


CASE = Case(
    "knob",
    "which training gives the knob: loss of the digits by iterations, by random depth and penalties",
    build,
    grid=product(training=list(TRAININGS), per_class=[20]),
    quick=product(training=list(TRAININGS)[-2:], per_class=[1]),
    metrics={
        "loss": Metric(noisy=True),
        "knob": Metric(None, noisy=True),
        "residual": Metric(noisy=True),
        "spectral_radius": Metric(None, noisy=True),
        "differing": Metric(noisy=True),
    },
    table=table,
)

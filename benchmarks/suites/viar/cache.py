"""Bytes of keys and values, VIAR's against VAR's, counted in the caches of real generations.

Nothing but the width decides how many bytes a token has in a layer, so a narrow model is run and its bytes
are scaled up: exact, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from matplotlib.axes import Axes

import viar
from viar.model.config import SIDES_256

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...rows import by_contender, grouped
from ...show import COLORS
from .models import Shape, implicit, random_tokenizer, random_transformer

LIMIT = 0.37
WIDTH = 8  # of the models that are run
KINDS = ("equilibrium", "iterate")


def build(
    run: Run,
    depth: int,
    iterations: int,
    num_explicit: tuple[int, int] = (5, 5),
    sides: Sequence[int] = SIDES_256,
) -> Iterator[Row]:
    """Float32 bytes of one image under guidance, width 64 `depth`.

    Args:
        run: where.
        depth: D.
        iterations: at every scale.
        num_explicit: blocks of VIAR before and after the implicit one.
        sides: of the scales.
    """
    models, tokenizer = _models(run.device, depth, num_explicit, tuple(sides))

    def cached(model: viar.NextScaleTransformer, **settings: Any) -> int:
        sample = viar.sample_tokens(model, tokenizer, [0], viar.Sampling(**settings))
        return sample.cache_bytes * 64 * depth // WIDTH

    yield {"contender": "VAR", "cache_bytes": cached(models["VAR"])}
    for kind in KINDS:
        size = cached(models["VIAR"], iterations=iterations, cache=kind)
        yield {"contender": kind, "cache_bytes": size}


@cache
def _models(
    device: torch.device, depth: int, num_explicit: tuple[int, int], sides: tuple[int, ...]
) -> tuple[dict[str, viar.NextScaleTransformer], viar.Tokenizer]:
    shape: dict[str, Any] = {"depth": depth, "width": WIDTH, "num_heads": 1, "sides": sides}
    shape |= {"codebook_size": 16, "code_channels": 4, "num_classes": 1}
    configs = {
        "VAR": viar.TransformerConfig(**shape),
        "VIAR": viar.TransformerConfig(**shape, trunk=implicit(*num_explicit)),
    }
    tokenizer = random_tokenizer(Shape.of(configs["VAR"], 1, 1, real_coder=False).tokenizer, device)
    return {name: random_transformer(config, device) for name, config in configs.items()}, tokenizer


def shares(rows: list[Row], kind: str) -> dict[int, float]:
    """Of VAR's bytes, by iterations."""
    found = {point[0]["iterations"]: by_contender(point) for point in grouped(rows, "iterations")}
    return {n: row[kind]["cache_bytes"] / row["VAR"]["cache_bytes"] for n, row in found.items()}


def bars(rows: list[Row]) -> list[Bar]:
    """The largest share of the equilibrium cache; the iterate cache's for information."""
    equilibrium = shares(rows, "equilibrium")
    iterate = ", ".join(f"{n}: {share:.2f}" for n, share in shares(rows, "iterate").items())
    name = f"cache VIAR / VAR, equilibrium, {min(equilibrium)} to {max(equilibrium)} iterations"
    worst = max(equilibrium.values(), default=math.nan)
    return [Bar(name, worst, LIMIT, f"iterate cache by iterations: {iterate}")]


def table(rows: list[Row]) -> Table:
    """One line a number of iterations."""
    head = ("iterations", "VAR", *KINDS, *(f"{kind} / VAR" for kind in KINDS))
    lines = []
    for point in grouped(rows, "depth", "iterations"):
        sizes = {name: row["cache_bytes"] for name, row in by_contender(point).items()}
        megabytes = [f"{size / 1e6:.1f}" for size in sizes.values()]
        ratios = [f"{sizes[kind] / sizes['VAR']:.3f}" for kind in KINDS]
        lines.append((str(point[0]["iterations"]), *megabytes, *ratios))
    return Table(f"cache, MB an image, float32, guided, depth {rows[0]['depth']}", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    (axis,) = axes
    for kind, color in zip(KINDS, (COLORS[0], COLORS[6]), strict=True):
        found = shares(rows, kind)
        axis.plot(list(found), list(found.values()), "o-", color=color, label=f"VIAR, {kind} cache")
    axis.axhline(1, color=COLORS[1], linestyle="--", label="VAR")
    axis.set(xlabel="iterations a scale", ylabel="cache / VAR's")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)


CASE = Case(
    "cache",
    "bytes of keys and values, VIAR's against VAR's, by iterations",
    build,
    grid=product(depth=[30], iterations=[2, 3, 5, 8, 10, 15, 20]),
    quick=product(depth=[30], iterations=[2, 10], sides=[[1, 2, 3]]),
    metrics={"cache_bytes": Metric()},
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("keys and values of an image",), size=(5.2, 3.6)),
)

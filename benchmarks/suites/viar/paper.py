"""What is published of ImageNet at 256 pixels, and ours where a figure can be had without trained weights.

Nothing is measured. Sources: VAR (arXiv 2404.02905) and its published checkpoints, VIAR (arXiv 2605.01220),
and for the other ways to a faster VAR their authors. Speed and memory to compare with are those of `trunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from matplotlib.axes import Axes
from torch import nn

import viar
from viar.evaluation.published import FIGURES
from viar.model.schedule import iteration_schedule

from ...case import Case, Metric, Picture, Row, Run, Table, product
from ...show import COLORS, curve, listing
from .models import implicit, written

CHECKPOINTS = {"source": "VAR's checkpoints"}
VIAR_PAPER = {"source": "arXiv 2605.01220, RTX 4090"}
AUTHORS = {"source": "its authors"}
VAR_MEMORY, VAR_SPEED = 19.24, 15.16  # GB, images a second


def quality(model: str, cfg: float, iterations: int | None = None) -> Row:
    """Published FID and, where there is one, inception score."""
    figures = FIGURES[model, cfg, iterations]
    return {name: figures[name] for name in ("fid", "inception_score") if name in figures}


# By model, rows of what is published; a pair is a range. Shares are of VAR-d30's figure.
PUBLISHED: dict[str, list[Row]] = {
    "tokenizer": [{"contender": "tokenizer", "parameters": 108_948_355, **CHECKPOINTS}],
    "VAR-d16": [{"contender": "VAR-d16", "parameters": 310_283_520, **CHECKPOINTS}],
    "VAR-d30": [
        {"contender": "VAR-d30", "parameters": 2_010_020_356, **CHECKPOINTS},
        {
            "contender": "VAR-d30, cfg 2.0",
            **quality("VAR-d30", 2.0),
            "memory_gb": VAR_MEMORY,
            **VIAR_PAPER,
        },
        {
            "contender": "VAR-d30, cfg 1.5",
            **quality("VAR-d30", 1.5),
            "memory_gb": VAR_MEMORY,
            "images_per_second": VAR_SPEED,
            **VIAR_PAPER,
        },
    ],
    "VIAR": [
        {"contender": "VIAR", "parameters": 770_884_426, "source": "arXiv 2605.01220"},
        {
            "contender": "VIAR, cfg 2.0",
            "iterations": 10,
            **quality("VIAR", 2.0, 10),
            "memory_gb": 11.16,
            **VIAR_PAPER,
        },
        {
            "contender": "VIAR, cfg 1.5",
            "iterations": 10,
            **quality("VIAR", 1.5, 10),
            "memory_gb": 11.16,
            "similarity": 0.999,
            **VIAR_PAPER,
        },
        *(
            {
                "contender": "VIAR, cfg 1.5",
                "iterations": iterations,
                **quality("VIAR", 1.5, iterations),
                "similarity": similarity,
                **VIAR_PAPER,
            }
            for iterations, similarity in ((8, 0.997), (5, 0.985), (2, 0.914))
        ),
        {
            "contender": "VIAR, fastest",
            "iterations": [10, 2],
            "memory_gb": 8.53,
            "images_per_second": 32.08,
            **VIAR_PAPER,
        },
    ],
    "others": [
        {"contender": "CoDe", "fid": 1.98, "memory_share": 0.5, "speed_share": 1.7, **AUTHORS},
        {"contender": "CoDe, faster", "fid": 2.27, "speed_share": 2.9, **AUTHORS},
        {"contender": "VARiant", "fid": [2.05, 2.12], "memory_share": [0.35, 0.6], **AUTHORS},
    ],
}


def build(run: Run, model: str) -> Iterator[Row]:
    """Published rows of a model, beside them our parameters and keys and values as a share of VAR-d30's."""
    found = _ours(model)
    for row in PUBLISHED[model]:
        row = dict(row)
        if "memory_gb" in row:
            row["memory_share"] = row["memory_gb"] / VAR_MEMORY
        if "images_per_second" in row:
            row["speed_share"] = row["images_per_second"] / VAR_SPEED
        if found is not None and "parameters" in row:
            row["our_parameters"] = sum(p.numel() for p in found.parameters())
        if isinstance(found, viar.NextScaleTransformer) and "iterations" in row:
            for kind in ("equilibrium", "iterate"):
                row[f"our_{kind}_cache_share"] = cache_share(found, row["iterations"], kind)
        yield row


def _ours(model: str) -> nn.Module | None:
    """Without memory for its weights."""
    configs: dict[str, dict[str, Any]] = {
        "VAR-d16": {"depth": 16},
        "VAR-d30": {"depth": 30},
        "VIAR": {"depth": 30, "trunk": implicit(5, 5)},
    }
    with torch.device("meta"):
        if model == "tokenizer":
            return viar.Tokenizer(viar.TokenizerConfig())
        if model in configs:
            return viar.NextScaleTransformer(viar.TransformerConfig(**configs[model]))
    return None


def cache_share(model: viar.NextScaleTransformer, iterations: int | list[int], kind: str) -> float:
    """Keys and values of a VIAR / of an explicit trunk of its depth, equally wide.

    Args:
        model: of any device; its weights are not read.
        iterations: a count, or those of the first scale and the last.
        kind: "equilibrium", or "iterate" as the published program does.
    """
    sides = model.config.sides
    first, last = iterations if isinstance(iterations, list) else (iterations, iterations)
    tokens = [side * side for side in sides]
    num_blocks = len(list(model.trunk.named_blocks()))
    counts = [1] * len(sides)
    if kind == "iterate":
        counts = cast("list[int]", iteration_schedule((first, last), len(sides)))
    implicit_sets = sum(n * length for n, length in zip(counts, tokens, strict=True))
    return ((num_blocks - 1) * sum(tokens) + implicit_sets) / (model.config.depth * sum(tokens))


def table(rows: list[Row]) -> Table:
    """One line a published setting."""
    columns: dict[str, Callable[[Row], str]] = {
        "published": lambda row: row["contender"],
        "iterations": lambda row: written(row.get("iterations", "")),
        "parameters, M": partial(_millions, "parameters"),
        "ours, M": partial(_millions, "our_parameters"),
        "FID": partial(_figure, "fid"),
        "IS": partial(_figure, "inception_score"),
        "state, cosine": partial(_figure, "similarity"),
        "memory, GB (of VAR's)": partial(_with_share, "memory_gb", "memory_share"),
        "images/s (of VAR's)": partial(_with_share, "images_per_second", "speed_share"),
        "our cache / VAR's": partial(_figure, "our_equilibrium_cache_share"),
        "a set an iteration": partial(_figure, "our_iterate_cache_share"),
        "source": lambda row: row["source"],
    }
    return listing("published figures, ImageNet at 256 pixels", rows, columns)


def _millions(name: str, row: Row) -> str:
    return f"{row[name] / 1e6:,.1f}" if name in row else ""


def _figure(name: str, row: Row) -> str:
    value = row.get(name, [])
    return " to ".join(f"{v:.4g}" for v in (value if isinstance(value, list) else [value]))


def _with_share(name: str, of_var: str, row: Row) -> str:
    figure, share = _figure(name, row), _figure(of_var, row)
    return f"{figure} ({share})".strip() if share else figure


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    by_iterations, by_memory = axes
    known = [row for row in rows if "similarity" in row]
    curve(by_iterations, known, "iterations", "fid", color=COLORS[0], label="VIAR, cfg 1.5")
    for row in rows:
        if row["contender"] == "VAR-d30, cfg 1.5":
            by_iterations.axhline(row["fid"], color=COLORS[1], linestyle="--", label=row["contender"])
        if isinstance(row.get("fid"), float) and isinstance(row.get("memory_share"), float):
            color = {"VIAR": COLORS[0], "VAR-d30": COLORS[1]}.get(row["model"], COLORS[2])
            by_memory.plot(row["memory_share"], row["fid"], "o", color=color)
            by_memory.annotate(
                row["contender"],
                (row["memory_share"], row["fid"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
            )
    by_iterations.set(xlabel="iterations a scale", ylabel="FID")
    by_iterations.legend(frameon=False, fontsize=8)
    by_memory.set(xlabel="memory / VAR-d30's", ylabel="FID", xlim=(0.4, 1.3))


CASE = Case(
    "paper",
    "published figures of ImageNet, and ours where trained weights are not needed; measures nothing",
    build,
    grid=product(model=PUBLISHED),
    quick=product(model=PUBLISHED),
    metrics={
        **dict.fromkeys(("fid", "inception_score", "similarity", "memory_gb", "memory_share"), Metric(None)),
        **dict.fromkeys(("parameters", "images_per_second", "speed_share"), Metric(None)),
        **dict.fromkeys(
            ("our_parameters", "our_equilibrium_cache_share", "our_iterate_cache_share"), Metric()
        ),
    },
    table=table,
    picture=Picture(_paint, lambda rows: ("quality by iterations", "quality and memory"), size=(4.8, 3.6)),
)

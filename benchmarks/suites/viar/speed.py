"""Time of sampling: ours against the straightforward baseline, same weights, same settings.

Decoding is the tokenizer's in both; with it, times are those of tokens and images together. Compiled models
are compared on a GPU only: points with `compile` are empty elsewhere.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

import viar
from viar.model.execution import computes_in

from ...baselines.viar import Baseline
from ...baselines.viar import sample_tokens as baseline_tokens
from ...case import SECONDS, Bar, Case, Picture, Row, Run, Settings, Table, product
from ...measure import interleaved, ratio, with_spread
from ...rows import by_contender, grouped, having
from ...show import COLORS
from .models import QUICK, Shape, implicit, mark_cell, random_tokenizer, random_transformer

BASELINE, HALF_BASELINE = "baseline, float32", "baseline, bfloat16 autocast"
OURS, HALF_OURS = "ours, float32", "ours, bfloat16"
PREPARED: dict[str, dict[str, Any]] = {  # arguments of `viar.prepare_inference`
    HALF_OURS: {"dtype": torch.bfloat16},
    "ours, float32, compiled": {"compile": True},
    "ours, bfloat16, compiled": {"dtype": torch.bfloat16, "compile": True},
}
ITERATIONS = 10
JUDGED_BATCH = 8
LIMITS = {OURS: 1 / 1.3, HALF_OURS: 1 / 2.5}  # of the time of `BASELINE`
TIMES = {"seconds": "tokens, s", "image_seconds": "with images, s"}
POINT = ("batch", "decode", "compile")


@dataclass
class Contender:
    """Samples tokens, and decodes those it sampled last."""

    sample: Callable[[], Tensor]  # f_hat
    tokenizer: viar.Tokenizer
    f_hat: Tensor | None = None

    def tokens(self) -> None:
        """Sample."""
        self.f_hat = self.sample()

    @torch.no_grad()
    def images(self) -> Tensor:
        """Decode."""
        assert self.f_hat is not None
        return self.tokenizer.decode_f_hat(self.f_hat)


def build(run: Run, batch: int, decode: bool, compile: bool) -> Iterator[Row]:
    """Seconds a batch of every contender.

    Args:
        run: where.
        batch: images.
        decode: time the images as well, by the published decoder.
        compile: with compiled models; no rows if the device is no GPU.
    """
    if compile and run.device.type != "cuda":
        return
    found = contenders(_shape(run, batch, decode), run.device, compiled=compile)
    tasks: dict[str, Callable[[], object]] = {}
    for name, contender in found.items():
        tasks[name] = contender.tokens
        if decode:
            tasks[f"{name}, images"] = contender.images
    times = interleaved(tasks, run.rounds)
    for name in found:
        row: Row = {"contender": name, "seconds": times[name]}
        if decode:
            both = zip(times[name], times[f"{name}, images"], strict=True)
            row["image_seconds"] = [sum(pair) for pair in both]
        yield row


def _shape(run: Run, batch: int, decode: bool) -> Shape:
    changes = QUICK if run.quick else {"width": 384, "num_heads": 6}
    config = viar.TransformerConfig(depth=5, trunk=implicit(2, 2), **changes)
    return Shape.of(config, batch, ITERATIONS, real_coder=decode and not run.quick)


def contenders(shape: Shape, device: torch.device, *, compiled: bool) -> dict[str, Contender]:
    """By name; all have the same weights."""
    model, tokenizer = (
        random_transformer(shape.transformer, device),
        random_tokenizer(shape.tokenizer, device),
    )
    baseline = Baseline.of(model)
    found = {
        BASELINE: Contender(partial(_baseline, baseline, tokenizer, shape, None), tokenizer),
        OURS: Contender(partial(_ours, model, tokenizer, shape), tokenizer),
    }
    if computes_in(torch.bfloat16, device):  # elsewhere ten times as slow, which tells nothing
        half = partial(_baseline, baseline, tokenizer, shape, torch.bfloat16)
        found[HALF_BASELINE] = Contender(half, tokenizer)
    for name, settings in PREPARED.items():
        if compiled or not settings.get("compile"):
            ready, codec = copy.deepcopy(model), copy.deepcopy(tokenizer)
            viar.prepare_inference(ready, codec, **settings)
            found[name] = Contender(partial(_ours, ready, codec, shape), codec)
    return found


def _baseline(
    baseline: Baseline, tokenizer: viar.Tokenizer, shape: Shape, half: torch.dtype | None
) -> Tensor:
    device = baseline.pos_embed.device
    labels, generator = shape.labels(device), torch.Generator(device).manual_seed(0)
    with torch.autocast(device.type, half, enabled=half is not None):
        return baseline_tokens(baseline, tokenizer, labels, **shape.sampling, generator=generator)[1]


def _ours(model: viar.NextScaleTransformer, tokenizer: viar.Tokenizer, shape: Shape) -> Tensor:
    labels = shape.labels(model.pos_embed.device)
    return viar.sample_tokens(model, tokenizer, labels, viar.Sampling(**shape.sampling)).f_hat


def profiled(run: Run, batch: int, decode: bool, compile: bool) -> Callable[[], object]:
    """Ours in float32; the cell is that of the implicit block."""
    shape = _shape(run, batch, decode)
    model = random_transformer(shape.transformer, run.device)
    mark_cell(model)
    return partial(_ours, model, random_tokenizer(shape.tokenizer, run.device), shape)


def ratios(point: list[Row]) -> dict[str, dict[str, float]]:
    """Time / the baseline's in float32, by contender and by what was timed."""
    base = by_contender(point)[BASELINE]
    return {
        row["contender"]: {what: ratio(row[what], base[what]) for what in TIMES if what in row}
        for row in point
    }


def bars(rows: list[Row]) -> list[Bar]:
    """Of sampling the tokens, batch 8, uncompiled."""
    points = grouped(having(rows, batch=JUDGED_BATCH, compile=False), *POINT)
    found = ratios(points[0]) if points else {}
    return [_bar(name, found.get(name, {}).get("seconds", math.nan)) for name in LIMITS]


def _bar(name: str, value: float) -> Bar:
    note = "" if math.isnan(value) else f"{1 / value:.2f} times as fast"
    return Bar(f"time, {name} / {BASELINE}", value, LIMITS[name], note)


def table(rows: list[Row]) -> Table:
    """One line a contender and point."""
    lines = []
    for point in grouped(rows, *POINT):
        found = ratios(point)
        for row in point:
            cells = []
            for what in TIMES:
                if what in row:
                    speed = 1 / found[row["contender"]][what]
                    cells += [with_spread(row[what]), f"{speed:.2f}"]
                else:
                    cells += ["", ""]
            lines.append((row["contender"], str(row["batch"]), *cells))
    head = ["contender", "batch"]
    for what in TIMES.values():
        head += [what, "x"]
    return Table("seconds a batch, median, and times as fast as the float32 baseline", head, lines)


def _panels(rows: list[Row]) -> list[str]:
    titles = []
    for row, *_ in grouped(rows, *POINT):
        extra = ", with images" * row["decode"] + ", compiled" * row["compile"]
        titles.append(f"batch {row['batch']}{extra}")
    return titles


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, point in zip(axes, grouped(rows, *POINT), strict=True):
        shown = point[::-1]
        colors = [COLORS[1] if row["contender"].startswith("baseline") else COLORS[0] for row in shown]
        times = [statistics.median(row["image_seconds" if row["decode"] else "seconds"]) for row in shown]
        axis.barh([row["contender"] for row in shown], times, color=colors)
        axis.set(xlabel="seconds a batch")


_USUAL: Settings = {"decode": False, "compile": False}
CASE = Case(
    "speed",
    "sampling against a straightforward implementation of the published program",
    build,
    grid=[
        *({"batch": batch, **_USUAL} for batch in (1, 4, JUDGED_BATCH)),
        {"batch": 1, "decode": True, "compile": False},
        {"batch": JUDGED_BATCH, "decode": False, "compile": True},
    ],
    quick=product(batch=[JUDGED_BATCH], decode=[True], compile=[False]),
    metrics={"seconds": SECONDS, "image_seconds": SECONDS},
    table=table,
    bars=bars,
    picture=Picture(_paint, _panels, columns=2, size=(5.4, 2.6)),
    solve=profiled,
)

"""VIAR against VAR of the published shape: images a second and peak memory.

Peak memory is the weights and buffers of the transformer and its tokenizer, and the most that is allocated
beyond what was there before the generation, in a run of its own.

Points of more than one image are for a GPU and empty elsewhere. A generation that takes longer than a minute
runs once, for both figures: its operations take so long that recording what they allocate does not show. At
depth 30 two CPU cores take VAR from one minute to eight. On a GPU the straightforward baseline is beside, its
weights in float32 under autocast, as the published program runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes

import viar

from ...baselines.viar import Baseline
from ...baselines.viar import sample_tokens as baseline_tokens
from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Settings, Table
from ...measure import interleaved, peak_bytes, ratio, seconds, with_spread
from ...rows import by_contender, grouped, having
from ...show import COLORS
from .models import (
    DTYPES,
    Shape,
    mark_cell,
    num_bytes,
    published,
    random_tokenizer,
    random_transformer,
    written,
)

LIMITS = {"time": 1 / 2, "peak": 0.45, "baseline": 1 / 1.5}
GPU_PEAK = 6e9  # bytes, of VIAR in the judged point of a GPU
FASTEST = [10, 2]  # iterations of the first scale and of the last, of the paper's fastest setting
ON_CPU: Settings = {"depth": 30, "batch": 1, "dtype": "float32", "iterations": FASTEST, "decode": False}
ON_GPU: Settings = {"depth": 30, "batch": 25, "dtype": "bfloat16", "iterations": FASTEST, "decode": False}
SLOW = 60  # seconds
BASELINE = ", baseline"  # behind the name of a model
POINT = tuple(ON_CPU)


def build(run: Run, depth: int, batch: int, dtype: str, iterations: list[int], decode: bool) -> Iterator[Row]:
    """Parameters of the transformer, bytes of weights and at the peak, seconds, of both models.

    Args:
        run: where; no rows for more than one image if the device is no GPU.
        depth: D; both are 64 D wide, VIAR has 5 + 1 + 5 blocks.
        batch: images.
        dtype: of the trunk's weights and the decoder's.
        iterations: of VIAR at the first scale and at the last.
        decode: make images, by the published decoder, not only tokens.
    """
    if batch > 1 and run.device.type != "cuda":
        return
    shape = _shape(run, depth, batch, iterations, decode=decode)
    yield from measured(shape, run, DTYPES[dtype], decode=decode)


def _shape(run: Run, depth: int, batch: int, iterations: list[int], *, decode: bool) -> Shape:
    first, last = iterations
    config = published("VIAR", depth, run)
    return Shape.of(config, batch, (first, last), real_coder=decode and not run.quick)


def measured(shape: Shape, run: Run, dtype: torch.dtype, *, decode: bool) -> Iterator[Row]:
    """One row a model."""
    tasks: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    names = ["VAR", "VIAR"]
    if run.device.type == "cuda" or run.quick:  # two CPU cores have enough to do
        names += [name + BASELINE for name in names]
    for name in names:
        make = _baseline if name.endswith(BASELINE) else _task
        tasks[name], weights, parameters = make(name, shape, run.device, dtype, decode=decode)
        rows[name] = {"contender": name, "parameters": parameters, "images": shape.batch}
        rows[name]["weight_bytes"] = weights
    first: dict[str, float] = {}

    def once(name: str) -> None:
        first[name] = seconds(tasks[name])

    if run.device.type == "cuda":  # the first run also sets up libraries: it is no one's peak
        for name in tasks:
            once(name)
    peaks = {name: peak_bytes(partial(once, name), run.device) for name in tasks}
    times = interleaved(tasks, run.rounds, limit=SLOW, warm_up=first)
    for name, row in rows.items():
        yield {**row, "peak_bytes": row["weight_bytes"] + peaks[name], "seconds": times[name]}


def _task(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, *, decode: bool
) -> tuple[Callable[[], object], int, int]:
    """A generation, bytes of the weights, parameters of the transformer."""
    config, sampling = _of(name, shape)
    model, tokenizer = random_transformer(config, device), random_tokenizer(shape.tokenizer, device)
    parameters = sum(p.numel() for p in model.parameters())
    if dtype != torch.float32:
        viar.prepare_inference(model, tokenizer, dtype=dtype)
    inputs = (model, tokenizer, shape.labels(device))
    task: Callable[[], object] = (
        partial(viar.generate, *inputs, **sampling)
        if decode
        else partial(viar.sample_tokens, *inputs, viar.Sampling(**sampling))
    )
    return task, num_bytes(model) + num_bytes(tokenizer), parameters


def _of(name: str, shape: Shape) -> tuple[viar.TransformerConfig, dict[str, Any]]:
    """The model's config, and how it samples."""
    config, sampling = shape.transformer, shape.sampling
    if name.startswith("VAR"):
        config = replace(config, trunk=viar.ExplicitTrunkConfig())
        sampling["iterations"] = None
    return config, sampling


def _baseline(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, *, decode: bool
) -> tuple[Callable[[], object], int, int]:
    """The same of the straightforward baseline."""
    config, sampling = _of(name, shape)
    baseline = Baseline.of(random_transformer(config, device))
    tokenizer, labels = random_tokenizer(shape.tokenizer, device), shape.labels(device)

    @torch.no_grad()
    def task() -> None:
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            f_hat = baseline_tokens(baseline, tokenizer, labels, **sampling, generator=generator)[1]
            baseline.forget()  # its keys and values, which are of the peak of each run anew
            if decode:
                tokenizer.decode_f_hat(f_hat)

    return task, num_bytes(baseline) + num_bytes(tokenizer), sum(p.numel() for p in baseline.parameters())


def profiled(
    run: Run, depth: int, batch: int, dtype: str, iterations: list[int], decode: bool
) -> Callable[[], object]:
    """VIAR's generation; the cell is that of the implicit block."""
    shape = _shape(run, depth, batch, iterations, decode=decode)
    model, tokenizer = (
        random_transformer(shape.transformer, run.device),
        random_tokenizer(shape.tokenizer, run.device),
    )
    viar.prepare_inference(model, tokenizer, dtype=DTYPES[dtype])
    mark_cell(model)
    labels, sampling = shape.labels(run.device), shape.sampling
    if decode:
        return partial(viar.generate, model, tokenizer, labels, **sampling)
    return partial(viar.sample_tokens, model, tokenizer, labels, viar.Sampling(**sampling))


def bars(rows: list[Row]) -> list[Bar]:
    """Time and peak of the judged point, a GPU's if it was measured, and on a GPU the peak itself."""
    on_gpu, on_cpu = (_point(rows, settings) for settings in (ON_GPU, ON_CPU))
    judged = on_gpu or on_cpu
    time = share = absolute = math.nan
    speed = peaks = ""
    if judged:
        var, viar_ = judged["VAR"], judged["VIAR"]
        time = ratio(viar_["seconds"], var["seconds"])
        share = viar_["peak_bytes"] / var["peak_bytes"]
        speed = f"{1 / time:.2f} times as many images a second"
        peaks = f"VIAR {viar_['peak_bytes'] / 1e9:.2f} GB, VAR {var['peak_bytes'] / 1e9:.2f} GB"
    against = []
    if on_gpu:
        absolute = on_gpu["VIAR"]["peak_bytes"]
    if "VIAR" + BASELINE in on_gpu:
        plain = ratio(on_gpu["VIAR"]["seconds"], on_gpu["VIAR" + BASELINE]["seconds"])
        note = f"{1 / plain:.2f} times as many images a second"
        against = [Bar("time VIAR / its straightforward baseline on a GPU", plain, LIMITS["baseline"], note)]
    return [
        Bar("time VIAR / VAR, depth 30", time, LIMITS["time"], speed),
        Bar("peak memory VIAR / VAR, depth 30", share, LIMITS["peak"], peaks),
        Bar("peak memory VIAR on a GPU, GB, depth 30, batch 25", absolute / 1e9, GPU_PEAK / 1e9),
        *against,
    ]


def _point(rows: list[Row], settings: Settings) -> dict[str, Row]:
    """By contender; none if the point was not measured."""
    return by_contender(having(rows, **settings))


def table(rows: list[Row]) -> Table:
    """One line a model and point."""
    lines = []
    for point in grouped(rows, *POINT):
        for row in point:
            what = f"{row['contender']}, depth {row['depth']}, batch {row['batch']}, {row['dtype']}"
            rates = [row["images"] / t for t in row["seconds"]]
            lines.append(
                (
                    what + ", with images" * row["decode"],
                    written(row["iterations"]) if row["contender"].startswith("VIAR") else "",
                    f"{row['parameters'] / 1e6:,.1f}",
                    with_spread(rates),
                    f"{row['weight_bytes'] / 1e9:.2f}",
                    f"{row['peak_bytes'] / 1e9:.2f}",
                )
            )
    head = ("model", "iterations", "parameters, M", "images/s", "weights, GB", "peak, GB")
    return Table("VIAR and VAR of one shape", head, lines)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    labels = []
    for position, point in enumerate(grouped(rows, *POINT)):
        found, row = by_contender(point), point[0]
        schedule, extra = written(row["iterations"]), ", images" * row["decode"]
        labels.append(f"depth {row['depth']}, {row['dtype']}\nbatch {row['batch']}, {schedule}{extra}")
        for name, shift, color in (("VAR", -0.2, COLORS[1]), ("VIAR", 0.2, COLORS[0])):
            label = name if position == 0 else None
            rate = found[name]["images"] / statistics.median(found[name]["seconds"])
            axes[0].barh(position + shift, rate, 0.38, color=color, label=label)
            axes[1].barh(position + shift, found[name]["peak_bytes"] / 1e9, 0.38, color=color, label=label)
    for axis, unit in zip(axes, ("images/s", "GB"), strict=True):
        axis.set(xlabel=unit)
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8)


CASE = Case(
    "trunks",
    "images a second and peak memory of VIAR against VAR, published shape",
    build,
    grid=[
        {**ON_CPU, "depth": 16},
        ON_CPU,
        ON_GPU,
        {**ON_GPU, "decode": True},
        *({**ON_GPU, "iterations": [count, count]} for count in (10, 5, 2)),
        *({**ON_GPU, "iterations": [count, count], "decode": True} for count in (10, 5, 2)),
        {**ON_GPU, "depth": 16},
    ],
    quick=[
        {"depth": 4, "batch": 1, "dtype": dtype, "iterations": FASTEST, "decode": decode}
        for dtype, decode in (("float32", False), ("bfloat16", True))
    ],
    metrics={
        "parameters": Metric(None),
        "weight_bytes": Metric(),
        "peak_bytes": Metric(),
        "seconds": SECONDS,
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: ("speed", "peak memory"), size=(5.2, 3.6)),
    solve=profiled,
)

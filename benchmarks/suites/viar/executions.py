"""Ways to run a generation, beside running it as it is: CUDA graphs, and blocks compiled by `torch.compile`.

What a batch of one image takes is its latency: there the device waits for the host, and a graph saves that.
Points are for a GPU and empty elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes

import viar

from ...case import SECONDS, Bar, Case, Metric, Picture, Row, Run, Settings, Table
from ...measure import interleaved, milliseconds, peak_bytes, ratio, seconds, with_spread
from ...rows import by_contender, grouped, having
from ...show import COLORS, listing
from .models import DTYPES, Shape, gigabytes, published, random_tokenizer, random_transformer, written
from .trunks import FASTEST

EAGER = "eager"
NOT_CAPTURED = "no graph was captured, so it ran as eager does; a CPU has no graphs"
LIMIT = 0.5  # of the time of a generation of one image as it is, with graphs
POINT = ("model", "execution", "depth", "batch", "dtype", "iterations")
JUDGED: Settings = {"model": "VIAR", "execution": "graphs", "depth": 30, "batch": 1, "dtype": "bfloat16"}


def build(
    run: Run, model: str, execution: str, depth: int, batch: int, dtype: str, iterations: list[int]
) -> Iterator[Row]:
    """Seconds of a generation of tokens, as it is and executed so, and those of its first call.

    Args:
        run: where; no rows if the device is no GPU.
        model: VAR or VIAR.
        execution: "graphs" or "compile", arguments of `viar.prepare_inference`.
        depth: D; the model is 64 D wide.
        batch: images.
        dtype: of the trunk's weights.
        iterations: of VIAR at the first scale and at the last.
    """
    if run.device.type != "cuda" and not run.quick:
        return
    first, last = iterations
    shape = Shape.of(published(model, depth, run), batch, (first, last), real_coder=False)
    tasks: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for name in (EAGER, execution):
        row: Row = {"images": batch, "first_seconds": None, "peak_bytes": None, "pool_bytes": None}
        row["error"] = None
        try:
            # Inductor takes minutes, and that all runs shows without it.
            choice = "eager" if run.quick and name == "compile" else True
            chosen = {} if name == EAGER else {execution: choice}
            task, transformer = _task(shape, run.device, DTYPES[dtype], chosen)
            row["first_seconds"] = seconds(task)
            row["peak_bytes"] = peak_bytes(task, run.device)
            row["pool_bytes"] = _pool_bytes(transformer)
            if transformer.graphs is not None and transformer.graphs.num_captures == 0:
                row["error"] = NOT_CAPTURED
            else:
                tasks[name] = task
        except Exception as error:  # this way of running it fails; the other is still measured
            row["error"] = f"{type(error).__name__}: {error}"
        rows[name] = {"contender": name, **row}
    times = interleaved(tasks, run.rounds)
    for name, row in rows.items():
        yield {**row, "seconds": times.get(name, [])}


def _task(
    shape: Shape, device: torch.device, dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[Callable[[], object], viar.NextScaleTransformer]:
    """A generation by a model with these settings of `viar.prepare_inference`, and the model."""
    config, sampling = shape.transformer, shape.sampling
    if isinstance(config.trunk, viar.ExplicitTrunkConfig):
        sampling["iterations"] = None
    model, tokenizer = random_transformer(config, device), random_tokenizer(shape.tokenizer, device)
    viar.prepare_inference(model, tokenizer, dtype=dtype, **settings)
    inputs = (model, tokenizer, shape.labels(device), viar.Sampling(**sampling))
    return partial(viar.sample_tokens, *inputs), model


def _pool_bytes(model: viar.NextScaleTransformer) -> int | None:
    """What captured graphs hold between generations; None if there are none."""
    graphs = model.graphs
    return None if graphs is None else int(graphs.num_bytes)


def bars(rows: list[Row]) -> list[Bar]:
    """The latency of VIAR with graphs; a GPU has it alone."""
    points = grouped(having(rows, **JUDGED), *POINT)
    found = by_contender(points[0]) if points else {}
    value, note = math.nan, ""
    if found and found["graphs"]["seconds"] and found[EAGER]["seconds"]:
        value = ratio(found["graphs"]["seconds"], found[EAGER]["seconds"])
        note = f"{1e3 * statistics.median(found['graphs']['seconds']):.0f} ms an image"
    return [Bar("latency of one image, VIAR, depth 30, graphs / eager", value, LIMIT, note)]


def table(rows: list[Row]) -> Table:
    """One line a contender and point; none of graphs where none was captured."""
    rows = [row for row in rows if row["error"] != NOT_CAPTURED]

    def model(row: Row) -> str:
        extra = f", {written(row['iterations'])} iterations" * (row["model"] == "VIAR")
        return f"{row['model']}, depth {row['depth']}, batch {row['batch']}, {row['dtype']}{extra}"

    def rate(row: Row) -> str:
        return "raised" if row["error"] else with_spread([row["images"] / time for time in row["seconds"]])

    columns: dict[str, Callable[[Row], str]] = {
        "model": model,
        "execution": lambda row: (
            row["contender"] + f", beside {row['execution']}" * (row["contender"] == EAGER)
        ),
        "ms a batch": lambda row: milliseconds(row["seconds"]),
        "images/s": rate,
        "peak beside weights and graphs, GB": lambda row: gigabytes(row["peak_bytes"]),
        "graphs, GB": lambda row: gigabytes(row["pool_bytes"]),
        "first call, s": lambda row: "-" if row["first_seconds"] is None else f"{row['first_seconds']:.1f}",
    }
    return listing("generation as it is and otherwise executed, tokens alone", rows, columns)


def _panels(rows: list[Row]) -> list[str]:
    return [f"{point[0]['model']}, batch {point[0]['batch']}" for point in grouped(rows, *POINT)]


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, point in zip(axes, grouped(rows, *POINT), strict=True):
        shown = [row for row in point[::-1] if row["seconds"]]
        times = [1e3 * statistics.median(row["seconds"]) for row in shown]
        axis.barh([row["contender"] for row in shown], times, color=COLORS[0])
        axis.set(xlabel="ms a batch")


_USUAL: Settings = {"depth": 30, "dtype": "bfloat16", "iterations": FASTEST}
CASE = Case(
    "executions",
    "generation with CUDA graphs and compiled, beside eager",
    build,
    grid=[
        {"model": model, "execution": execution, "batch": batch, **_USUAL}
        for execution in ("graphs", "compile")
        for model, batch in (("VIAR", 1), ("VIAR", 25), ("VAR", 1), ("VAR", 25))
    ],
    quick=[
        {"model": "VIAR", "execution": execution, "batch": 1, **_USUAL, "depth": 4}
        for execution in ("graphs", "compile")
    ],
    metrics={
        "first_seconds": SECONDS,
        "peak_bytes": Metric(),
        "pool_bytes": Metric(),
        "seconds": SECONDS,
        "error": Metric(better=None),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, _panels, columns=2, size=(4.4, 2.0)),
)

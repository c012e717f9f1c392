"""VIAR against VAR of the published shape: images a second and peak memory.

Peak memory is the weights and buffers of the transformer and its tokenizer, and the most that is allocated
beyond what was there before the generation. On the CPU that is counted allocation by allocation in a run of
its own, on a GPU it is what PyTorch's allocator says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.table import Table

import viar

from ...peak import peak_bytes
from ...report import Bar
from ...timing import interleaved, ratio
from .models import Case, implicit, num_bytes, random_tokenizer, random_transformer

LIMITS = {"time": 1 / 2, "peak": 0.45}
GPU_PEAK = 6e9  # bytes, batch 25, bfloat16
ITERATIONS = (10, 2)


def case(
    depth: int,
    batch: int,
    *,
    num_explicit: tuple[int, int] = (5, 5),
    real_coder: bool = False,
    **changes: Any,
) -> Case:
    """VIAR of this depth, 64 `depth` wide unless `changes` say otherwise."""
    config = viar.TransformerConfig(depth=depth, trunk=implicit(*num_explicit), **changes)
    return Case.of(config, batch, ITERATIONS, real_coder=real_coder)


def measure(
    shape: Case, rounds: int, device: torch.device, dtype: torch.dtype, *, decode: bool = False
) -> dict[str, dict[str, Any]]:
    """By model: parameters, images, seconds a round, peak bytes."""
    tasks: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in ("VAR", "VIAR"):
        task, weights, parameters = _task(name, shape, device, dtype, decode=decode)
        tasks[name] = task
        rows[name] = {"parameters": parameters, "images": shape.batch, "weight_bytes": weights}
    for name, times in interleaved(tasks, rounds).items():
        rows[name]["seconds"] = times
    for name, task in tasks.items():  # after the times: on a GPU the first run also sets up libraries
        rows[name]["peak_bytes"] = rows[name]["weight_bytes"] + peak_bytes(task, device)
    return rows


def _task(
    name: str, shape: Case, device: torch.device, dtype: torch.dtype, *, decode: bool
) -> tuple[Callable[[], object], int, int]:
    """A generation, bytes of the weights, parameters of the transformer."""
    config, iterations = shape.transformer, shape.iterations
    if name == "VAR":
        explicit = viar.ExplicitTrunkConfig()
        config, iterations = viar.TransformerConfig(**{**vars(config), "trunk": explicit}), None
    model, tokenizer = random_transformer(config, device), random_tokenizer(shape.tokenizer, device)
    parameters = sum(p.numel() for p in model.parameters())
    if dtype != torch.float32:
        viar.prepare_inference(model, tokenizer, dtype=dtype)
    sampler = viar.generate if decode else viar.sample_tokens
    task = partial(
        sampler,
        model,
        tokenizer,
        shape.labels(device),
        iterations=iterations,
        cfg=shape.cfg,
        top_k=shape.top_k,
        top_p=shape.top_p,
    )
    return task, num_bytes(model) + num_bytes(tokenizer), parameters


def bars(rows: dict[str, dict[str, Any]], device: torch.device) -> list[Bar]:
    """Time, peak, and on a GPU the peak itself."""
    var, viar_ = rows["VAR"], rows["VIAR"]
    time = ratio(viar_["seconds"], var["seconds"])
    peaks = f"VIAR {viar_['peak_bytes'] / 1e9:.2f} GB, VAR {var['peak_bytes'] / 1e9:.2f} GB"
    absolute = viar_["peak_bytes"] if device.type == "cuda" else math.nan
    return [
        Bar("time VIAR / VAR", time, LIMITS["time"], f"{1 / time:.2f} times as many images a second"),
        Bar("peak memory VIAR / VAR", viar_["peak_bytes"] / var["peak_bytes"], LIMITS["peak"], peaks),
        Bar("peak memory VIAR on a GPU, GB", absolute / 1e9, GPU_PEAK / 1e9),
    ]


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a model."""
    shown = Table(title=f"VIAR {ITERATIONS} and VAR of one shape")
    for column in ("model", "parameters, M", "images/s", "weights, GB", "peak, GB"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        shown.add_row(
            name,
            f"{row['parameters'] / 1e6:,.1f}",
            f"{row['images'] / statistics.median(row['seconds']):.4g}",
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
    return shown

"""Time of sampling: ours against the straightforward baseline, same weights, same settings.

Decoding is the tokenizer's in both; with it, times are those of tokens and images together.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import viar
from viar.trunk import computes_in

from ...baselines.viar import Baseline
from ...baselines.viar import sample_tokens as baseline_tokens
from ...report import Bar
from ...timing import interleaved, ratio
from .models import Case, random_tokenizer, random_transformer

BASELINE, HALF_BASELINE = "baseline, float32", "baseline, bfloat16 autocast"
OURS, HALF_OURS = "ours, float32", "ours, bfloat16"
PREPARED: dict[str, dict[str, Any]] = {  # arguments of `viar.prepare_inference`
    HALF_OURS: {"dtype": torch.bfloat16},
    "ours, float32, compiled": {"compile": True},
    "ours, bfloat16, compiled": {"dtype": torch.bfloat16, "compile": True},
}
LIMITS = {OURS: 1 / 1.3, HALF_OURS: 1 / 2.5}  # of the time of `BASELINE`


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


def measure(
    case: Case, rounds: int, device: torch.device, *, decode: bool = False, compiled: bool = True
) -> dict[str, dict[str, Any]]:
    """Seconds a round by contender, of the tokens and, with `decode`, of the images."""
    found = contenders(case, device, compiled=compiled)
    tasks: dict[str, Callable[[], object]] = {}
    for name, contender in found.items():
        tasks[name] = contender.tokens
        if decode:
            tasks[f"{name}, images"] = contender.images
    times = interleaved(tasks, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for name in found:
        rows[name] = {"tokens": times[name]}
        if decode:
            both = zip(times[name], times[f"{name}, images"], strict=True)
            rows[name]["with images"] = [sum(pair) for pair in both]
    return rows


def contenders(case: Case, device: torch.device, *, compiled: bool = True) -> dict[str, Contender]:
    """By name; all have the same weights."""
    model, tokenizer = random_transformer(case.transformer, device), random_tokenizer(case.tokenizer, device)
    baseline = Baseline.of(model)
    found = {
        BASELINE: Contender(partial(_baseline, baseline, tokenizer, case, None), tokenizer),
        OURS: Contender(partial(_ours, model, tokenizer, case), tokenizer),
    }
    if computes_in(torch.bfloat16, device):  # elsewhere ten times as slow, which tells nothing
        half = partial(_baseline, baseline, tokenizer, case, torch.bfloat16)
        found[HALF_BASELINE] = Contender(half, tokenizer)
    for name, settings in PREPARED.items():
        if compiled or not settings.get("compile"):
            ready, codec = copy.deepcopy(model), copy.deepcopy(tokenizer)
            viar.prepare_inference(ready, codec, **settings)
            found[name] = Contender(partial(_ours, ready, codec, case), codec)
    return found


def _baseline(baseline: Baseline, tokenizer: viar.Tokenizer, case: Case, half: torch.dtype | None) -> Tensor:
    device = baseline.pos_embed.device
    labels, generator = case.labels(device), torch.Generator(device).manual_seed(0)
    settings = (case.iterations, case.cfg, case.top_k, case.top_p)
    with torch.autocast(device.type, half, enabled=half is not None):
        return baseline_tokens(baseline, tokenizer, labels, *settings, generator)[1]


def _ours(model: viar.NextScaleTransformer, tokenizer: viar.Tokenizer, case: Case) -> Tensor:
    return viar.sample_tokens(
        model,
        tokenizer,
        case.labels(model.pos_embed.device),
        iterations=case.iterations,
        cfg=case.cfg,
        top_k=case.top_k,
        top_p=case.top_p,
    ).f_hat


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time / the baseline's in float32, by contender and by what was timed."""
    return {
        name: {what: ratio(times, rows[BASELINE][what]) for what, times in row.items()}
        for name, row in rows.items()
    }


def bars(rows: dict[str, dict[str, Any]]) -> list[Bar]:
    """Of sampling the tokens."""
    found = ratios(rows)
    return [
        Bar(
            f"time, {name} / {BASELINE}",
            found[name]["tokens"],
            limit,
            f"{1 / found[name]['tokens']:.2f} times as fast; "
            + ", ".join(
                f"{what}: {1 / value:.2f}" for what, value in found[name].items() if what != "tokens"
            ),
        )
        for name, limit in LIMITS.items()
    ]


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a contender."""
    shown = Table(title="seconds a batch, median, and times as fast as the float32 baseline")
    shown.add_column("contender")
    for what in rows[BASELINE]:
        shown.add_column(what, justify="right")
        shown.add_column("x", justify="right")
    for name, row in ratios(rows).items():
        cells = []
        for what, value in row.items():
            cells += [f"{statistics.median(rows[name][what]):.3f}", f"{1 / value:.2f}"]
        shown.add_row(name, *cells)
    return shown


def record(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For JSON."""
    found = ratios(rows)
    return {name: {"seconds": rows[name], "ratio_to_baseline": found[name]} for name in rows}

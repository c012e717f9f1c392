"""Bytes of keys and values, VIAR's against VAR's, counted in the caches of real generations.

Nothing but the width decides how many bytes a token has in a layer, so a narrow model is run and its bytes
are scaled up: exact, in seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

import viar
from viar.config import SIDES_256

from ...report import Bar
from .models import Case, implicit, random_tokenizer, random_transformer

LIMIT = 0.37
WIDTH = 8  # of the models that are run
COUNTS = (2, 3, 5, 8, 10, 15, 20)
KINDS = ("equilibrium", "iterate")


def measure(
    device: torch.device,
    *,
    depth: int = 30,
    num_explicit: tuple[int, int] = (5, 5),
    sides: tuple[int, ...] = SIDES_256,
    counts: tuple[int, ...] = COUNTS,
) -> dict[str, Any]:
    """Float32 bytes of one image under guidance: VAR's, and VIAR's by kind of cache and iterations.

    Args:
        device: where to run.
        depth: D; the width that bytes are scaled to is 64 D.
        num_explicit: blocks of VIAR before and after the implicit one.
        sides: of the scales.
        counts: iterations at every scale.
    """
    shape = {"depth": depth, "width": WIDTH, "num_heads": 1, "sides": sides}
    shape |= {"codebook_size": 16, "code_channels": 4, "num_classes": 1}
    config = viar.TransformerConfig(**shape)
    tokenizer = random_tokenizer(Case.of(config, 1, 1, real_coder=False).tokenizer, device)
    var = random_transformer(config, device)
    implicit_config = viar.TransformerConfig(**shape, trunk=implicit(*num_explicit))
    model = random_transformer(implicit_config, device)

    def cached(transformer: viar.NextScaleTransformer, **settings: Any) -> int:
        sample = viar.sample_tokens(transformer, tokenizer, [0], **settings)
        return sample.cache_bytes * 64 * depth // WIDTH

    found = {kind: {n: cached(model, iterations=n, cache=kind) for n in counts} for kind in KINDS}
    return {"var": cached(var), **found}


def bars(row: dict[str, Any]) -> list[Bar]:
    """The largest share of the equilibrium cache; the iterate cache's for information."""
    shares = {n: size / row["var"] for n, size in row["equilibrium"].items()}
    iterate = ", ".join(f"{n}: {size / row['var']:.2f}" for n, size in row["iterate"].items())
    note = f"iterate cache by iterations: {iterate}"
    name = f"cache VIAR / VAR, equilibrium, {min(shares)} to {max(shares)} iterations"
    return [Bar(name, max(shares.values()), LIMIT, note)]


def table(row: dict[str, Any]) -> Table:
    """One line a number of iterations."""
    shown = Table(title=f"cache, MB an image, float32, guided (VAR: {row['var'] / 1e6:.1f})")
    for column in ("iterations", *KINDS, *(f"{kind} / VAR" for kind in KINDS)):
        shown.add_column(column, justify="right")
    for n in row["equilibrium"]:
        sizes = [row[kind][n] for kind in KINDS]
        shares = [f"{size / row['var']:.3f}" for size in sizes]
        shown.add_row(str(n), *(f"{size / 1e6:.1f}" for size in sizes), *shares)
    return shown


def record(row: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    by_kind = {kind: {str(n): size for n, size in row[kind].items()} for kind in KINDS}
    return {"var": row["var"], **by_kind}

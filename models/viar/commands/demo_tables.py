"""What the demo shows of its summary: the comparison of VIAR and VAR, and the knob."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the two tables of `summary.json`, see `viar.commands.demo.run_demo`."""
    console.print(_comparison(summary))
    console.print(_knob(summary["knob"]))


def _comparison(summary: dict[str, Any]) -> Table:
    viar, var = (summary["models"][name] for name in ("viar", "var"))
    real = summary["classifier"]["held_out_accuracy"]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "parameters", lambda v: f"{v:,}"),
        ("validation loss, nats a token", "validation_loss", lambda v: f"{v:.4f}"),
        (
            f"class consistency (classifier on real digits: {real:.3f})",
            "class_consistency",
            lambda v: f"{v:.3f}",
        ),
        ("images/s", "images_per_second", lambda v: f"{v:,.0f}"),
        ("peak cache, MB", "peak_cache_bytes", lambda v: f"{v / 1e6:.2f}"),
        ("training peak memory, MB", "training_peak_bytes", lambda v: f"{v / 1e6:.1f}"),
    ]
    table = Table(title="VAR and VIAR of equal width and training time, 8 x 8 digits")
    for column in ("", f"VIAR, {viar['iterations']} iterations", "VAR", "VIAR / VAR"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, show in rows:
        ratio = f"{viar[key] / var[key]:.3f}" if var[key] else "-"  # VAR may hit no class at all
        table.add_row(label, show(viar[key]), show(var[key]), ratio)
    table.add_row("training steps, in equal time", *(f"{m['training']['steps']:,}" for m in (viar, var)), "")
    return table


def _knob(points: list[dict[str, Any]]) -> Table:
    table = Table(title="The knob: iterations a scale, chosen at inference")
    for column in ("iterations", "class consistency", "validation loss", "images/s", "cache, MB"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            str(point["iterations"]) if point["model"] == "viar" else "VAR",
            f"{point['class_consistency']:.3f}",
            f"{point['validation_loss']:.4f}",
            f"{point['images_per_second']:,.0f}",
            f"{point['cache_bytes'] / 1e6:.2f}",
        )
    return table

"""What the demo shows of its summary: the shipped VIAR, the comparison of VIAR and VAR, and the knob."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_shipped(points: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the knob of the shipped VIAR, see `viar.commands.demo_measures.draw_shipped`."""
    table = Table(title="The VIAR that comes with the package: iterations a scale, chosen at inference")
    for column in ("iterations", "validation loss", "images/s"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            str(point["iterations"]), f"{point['validation_loss']:.4f}", f"{point['images_per_second']:,.0f}"
        )
    console.print(table)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the two tables of `summary.json` on what was trained, see `viar.commands.demo.run_demo`."""
    console.print(_comparison(summary))
    console.print(_knob(summary["knob"]))


def _comparison(summary: dict[str, Any]) -> Table:
    viar, var, shipped = (summary["models"][name] for name in ("viar", "var", "shipped"))
    viar, var = ({**model, "last_over_best": model["training"]["last_over_best"]} for model in (viar, var))
    accuracy, fid = summary["judge"]["held_out_accuracy"], summary["real"]["fid"]
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "parameters", lambda v: f"{v:,}"),
        ("validation loss, nats a token", "validation_loss", lambda v: f"{v:.4f}"),
        ("its last over its best", "last_over_best", lambda v: f"{v:.3f}"),
        (f"FID in the judge's features (held-out pictures: {fid:.3g})", "fid", lambda v: f"{v:.3g}"),
        (f"class consistency (of real pictures: {accuracy:.3f})", "class_consistency", lambda v: f"{v:.3f}"),
        ("distance to training pictures (held-out ones: 1)", "memorisation", lambda v: f"{v:.2f}"),
        ("images/s", "images_per_second", lambda v: f"{v:,.0f}"),
        ("peak cache, MB", "cache_bytes", lambda v: f"{v / 1e6:.2f}"),
        ("training peak memory, MB", "training_peak_bytes", lambda v: f"{v / 1e6:.1f}"),
    ]
    steps = viar["training"]["steps"]
    table = Table(title=f"VIAR and VAR of equal width, {steps:,} steps each on digits of MNIST")
    for column in ("", f"VIAR, {viar['iterations']} iterations", "VAR", "VIAR / VAR", "shipped VIAR"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key, show in rows:
        ratio = f"{viar[key] / var[key]:.3f}" if var[key] else "-"  # VAR may hit no class at all
        table.add_row(
            label, show(viar[key]), show(var[key]), ratio, show(shipped[key]) if key in shipped else ""
        )
    return table


def _knob(points: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="The knob of the VIAR that was trained")
    for column in ("iterations", "FID", "class consistency", "validation loss", "images/s", "cache, MB"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            str(point["iterations"]) if point["model"] == "viar" else "VAR",
            f"{point['fid']:.3g}",
            f"{point['class_consistency']:.3f}",
            f"{point['validation_loss']:.4f}",
            f"{point['images_per_second']:,.0f}",
            f"{point['cache_bytes'] / 1e6:.2f}",
        )
    return table

"""In-painting of held-out digits: with the centre hidden and the true class given, is the class kept?"""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

import viar
from viar.evaluate import class_consistency

from ...report import Bar
from .models import DIGITS_SAMPLING, Trained

LIMIT = 0.10


def measure(trained: Trained, most: int | None = None) -> dict[str, Any]:
    """Shares of held-out digits in which the classifier sees the true class, as they are and edited.

    Args:
        trained: the models; VIAR edits.
        most: digits; default all that are held out.
    """
    held_out = trained.data.validation
    images, labels = held_out.__getitems__(range(min(most or len(held_out), len(held_out))))
    images, labels = ((images + 1) / 2).to(trained.device), labels.to(trained.device)
    side = images.shape[-1]
    mask = torch.ones(side, side, device=trained.device)
    mask[side // 4 : side - side // 4, side // 4 : side - side // 4] = 0
    edited = viar.edit(trained.viar, trained.tokenizer, images, mask, labels, **DIGITS_SAMPLING)
    kept = mask.bool()
    grey = images.where(kept, 0.5)
    return {
        "images": len(labels),
        "hidden": float((mask == 0).float().mean()),
        "class": {
            "real": class_consistency(trained.classifier, images, labels),
            "edited": class_consistency(trained.classifier, edited, labels),
            "hidden": class_consistency(trained.classifier, grey, labels),
        },
        "kept_region_mean_error": float((edited - images)[..., kept].abs().mean()),
    }


def bars(row: dict[str, Any]) -> list[Bar]:
    """The share that loses its class."""
    found = row["class"]
    note = f"real digits {1 - found['real']:.3f}, centre left grey {1 - found['hidden']:.3f}"
    return [Bar("in-painted digits not of their class", 1 - found["edited"], LIMIT, note)]


def table(row: dict[str, Any]) -> Table:
    """Three shares and an error."""
    shown = Table(title=f"{row['images']} held-out digits, {row['hidden']:.0%} hidden")
    shown.add_column("what")
    shown.add_column("", justify="right")
    for name, share in row["class"].items():
        shown.add_row(f"class found, {name}", f"{share:.3f}")
    shown.add_row("mean error where kept, of 1", f"{row['kept_region_mean_error']:.4f}")
    return shown

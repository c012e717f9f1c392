"""Editing of held-out pictures of MNIST: our way of keeping a region beside the published one, VIAR and VAR.

The judge says whether it sees the class that was asked for. How close the region made anew is to real ones is
the Fréchet distance between the judge's features of pictures in which all but that region is black, edited
ones and real ones of the training set: what was kept has no say in it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

import viar
from viar.data import all_batches
from viar.evaluation import Moments, class_consistency, frechet_distance

from ...case import Bar, Case, Metric, Picture, Row, Run, Table, product
from ...rows import by_contender, distinct, grouped, having
from ...show import listing
from .mnist import held_out, trained_mnist
from .models import AT_ONCE, DIGITS_SAMPLING, Trained

INPAINTING, OUTPAINTING, OTHER_CLASS = "in-painting", "out-painting", "another class"
TASKS = (INPAINTING, OUTPAINTING, OTHER_CLASS)
CENTRE = (0.25, 0.25, 0.75, 0.75)  # of the picture: hidden, or in out-painting all that is kept
KEEPS = {"published way": "codes", "ours": "features"}
REAL, GREY = "as they are", "hidden part grey"
JUDGED = "VIAR, ours"
LIMITS = {"class": 0.08, "seam": 0.5}


class Seam(NamedTuple):
    """What a mask's border looks like in edited pictures; all of the intensity's range, 0 to 1."""

    ring: float  # mean error of the kept pixels near the hidden part
    jump: float  # mean difference of two neighbours of which one is kept and one is hidden
    untouched: float  # the same in the untouched pictures

    @property
    def error(self) -> float:
        """What is lost beside the border, and by how much the jump across it is larger than it was."""
        return self.ring + max(0.0, self.jump - self.untouched)


def seam(
    edited: Tensor,  # (B, 3, H, W) in [0, 1]
    real: Tensor,  # likewise
    kept: Tensor,  # (H, W) bool
    ring: int,
) -> Seam:
    """How well the part made anew joins the rest.

    Neither half of it is enough: kept pixels that are put back leave no error and may leave an edge, and a
    decoder that makes the whole picture leaves no edge and changes what was to be kept.

    Args:
        edited: what became of the pictures.
        real: the pictures.
        kept: which pixels were to be kept.
        ring: kept pixels at most so far from a hidden one count, the larger one of rows and columns.
    """
    hidden = (~kept).float()[None, None]
    near = F.max_pool2d(hidden, 2 * ring + 1, stride=1, padding=ring)[0, 0].bool() & kept
    error = (edited - real).abs()[..., near].mean()
    return Seam(float(error), _jump(edited, kept), _jump(real, kept))


def _jump(images: Tensor, kept: Tensor) -> float:
    """Mean difference across the border, over pairs of a row and pairs of a column."""
    pairs = [images.diff(dim=dim).abs()[..., kept.int().diff(dim=dim) != 0].flatten() for dim in (-1, -2)]
    return float(torch.cat(pairs).mean())


def build(run: Run, task: str, images: int) -> Iterator[Row]:
    """Every way of editing, the pictures as they are, and with their hidden part grey.

    Args:
        run: where.
        task: one of `TASKS`.
        images: at most so many; 500 are held out.
    """
    trained = trained_mnist(run)
    real, labels = held_out(trained, images)
    real = (real + 1) / 2
    mask = viar.box_mask(CENTRE, real.shape[-1]).to(trained.device)
    mask = 1 - mask if task == OUTPAINTING else mask
    asked = other_classes(labels, trained.data.num_classes) if task == OTHER_CLASS else labels
    kept = mask.bool()
    found = {REAL: real, GREY: real.where(kept, 0.5)}
    for way, keep in KEEPS.items():
        for name, model in (("VAR", trained.var), ("VIAR", trained.viar)):
            found[f"{name}, {way}"] = _edited(trained, model, real, mask, asked, keep)
    reference = _reference(trained, kept)
    shown = one_of_each(labels, trained.data.num_classes)
    token = real.shape[-1] // trained.tokenizer.config.sides[-1]
    for name, made in found.items():
        border = seam(made, real, kept, token)
        yield {
            "contender": name,
            "images": len(made),
            "class_consistency": class_consistency(trained.classifier, made, asked),
            "region_distance": frechet_distance(_region_moments(trained, made, kept), reference),
            "seam_error": border.error,
            **border._asdict(),
            "strip": strip(made[shown]),
            "asked": asked[shown].tolist(),
        }


def other_classes(
    labels: Tensor,  # (B,)
    num_classes: int,
) -> Tensor:
    """Another class for each, (B,): all others in turn."""
    turn = torch.arange(len(labels), device=labels.device) % (num_classes - 1)
    return (labels + 1 + turn) % num_classes


def one_of_each(
    labels: Tensor,  # (B,)
    num_classes: int,
) -> list[int]:
    """Where the first picture of every class is, of those classes that there are."""
    where = [(labels == label).nonzero() for label in range(num_classes)]
    return [int(found[0]) for found in where if len(found)]


def _edited(
    trained: Trained,
    model: viar.NextScaleTransformer,
    images: Tensor,
    mask: Tensor,
    asked: Tensor,
    keep: str,
) -> Tensor:
    sampling, parts = viar.Sampling(**DIGITS_SAMPLING), []
    for start in range(0, len(images), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        parts.append(
            viar.edit(
                model,
                trained.tokenizer,
                images[few],
                mask,
                asked[few],
                sampling=sampling,
                first_index=start,
                keep=keep,
            )
        )
    return torch.cat(parts)


def _reference(trained: Trained, kept: Tensor) -> Moments:
    """Of the same region of real pictures that none of the edited ones is of."""
    train = torch.cat([images for images, _ in all_batches(trained.data.train, AT_ONCE)])
    return _region_moments(trained, ((train + 1) / 2).to(trained.device), kept)


@torch.no_grad()
def _region_moments(trained: Trained, images: Tensor, kept: Tensor) -> Moments:
    alone = images.where(~kept, 0.0) * 2 - 1
    return Moments.of(torch.cat([trained.classifier.embed(few) for few in torch.split(alone, AT_ONCE)]))


def strip(
    images: Tensor,  # (B, 3, H, W) in [0, 1]
) -> str:
    """Pictures side by side as a grey PNG in text: rows of figures hold text, and MNIST is grey."""
    grey = torch.cat(list(images.mean(1).mul(255).round().byte().cpu()), dim=-1)
    file = io.BytesIO()
    Image.fromarray(grey.numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def unrolled(text: str) -> npt.NDArray[np.uint8]:
    """The strip again, (H, B W)."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


def bars(rows: list[Row]) -> list[Bar]:
    """Of in-painting by VIAR, our way."""
    found = by_contender(having(rows, task=INPAINTING))
    lost = {name: 1 - row["class_consistency"] for name, row in found.items()}
    note = ", ".join(f"{name} {share:.3f}" for name, share in lost.items() if name != JUDGED)
    ours, theirs = (
        found.get(f"VIAR, {way}", {}).get("seam_error", math.nan) for way in ("ours", "published way")
    )
    return [
        Bar("in-painted digits not of their class", lost.get(JUDGED, math.nan), LIMITS["class"], note),
        Bar(
            "seam error of in-painted digits, ours / published way",
            ours / theirs,
            LIMITS["seam"],
            f"{ours:.4f} / {theirs:.4f}" if found else "",
        ),
    ]


def table(rows: list[Row]) -> Table:
    """One line a way of editing, task by task."""
    columns: dict[str, Callable[[Row], str]] = {
        "task": lambda row: row["task"],
        "pictures": lambda row: row["contender"],
        "seen as asked for": lambda row: f"{row['class_consistency']:.3f}",
        "distance of the region": lambda row: f"{row['region_distance']:.3g}",
        "seam error": lambda row: f"{row['seam_error']:.4f}",
        "error beside the border": lambda row: f"{row['ring']:.4f}",
        "jump across it": lambda row: f"{row['jump']:.4f}",
    }
    return listing("held-out pictures of MNIST, edited", rows, columns)


def _paint(rows: list[Row], axes: list[Axes]) -> None:
    for axis, task in zip(axes, grouped(rows, "task"), strict=True):
        lines = [unrolled(row["strip"]) for row in task]
        side = len(lines[0])
        axis.imshow(np.concatenate(lines), cmap="gray", vmin=0, vmax=255)
        axis.set_yticks(
            [side * (i + 0.5) for i in range(len(lines))], distinct(task, "contender"), fontsize=8
        )
        asked = task[0]["asked"]
        axis.set_xticks([side * (i + 0.5) for i in range(len(asked))], asked, fontsize=8)
        axis.set_xlabel("class asked for", fontsize=8)
        axis.tick_params(length=0)
        axis.set_anchor("E")  # leaves the room for the names of the lines
        axis.grid(False)
        for edge in axis.spines.values():
            edge.set_visible(False)


CASE = Case(
    "editing",
    "held-out pictures of MNIST edited by VIAR and VAR, our way and the published one",
    build,
    grid=product(task=TASKS, images=[500]),
    quick=product(task=TASKS, images=[12]),
    metrics={
        "class_consistency": Metric("higher"),
        "region_distance": Metric(noisy=True),
        "seam_error": Metric(noisy=True),
        "ring": Metric(noisy=True),
        "jump": Metric(None, noisy=True),
        "untouched": Metric(None, noisy=True),
        "strip": Metric(None, noisy=True),
    },
    table=table,
    bars=bars,
    picture=Picture(_paint, lambda rows: distinct(rows, "task"), columns=1, size=(6.8, 3.6)),
)

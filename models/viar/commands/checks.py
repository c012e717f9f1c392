"""What commands compare before work begins: where they write, which classes there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..data.decoding import shown
from ..files import check_writable
from ..generation.settings import Sampling
from ..model.transformer import NextScaleTransformer
from .loading import say

# What a folder of other work has in it, which a training run must not write into.
OTHER_WORK = {
    "series.json": "a series of images",
    "classifier.safetensors": "a classifier",
    "shards.json": "tokens of a data set",
    "begun.json": "a stage of the demo",
}


def check_picture(out: Path) -> None:
    """Raise `ValueError` unless a PNG may be written at `out`."""
    if out.suffix.lower() not in ("", ".png"):
        raise ValueError(f"--out: a PNG is written, so expected a name that ends in .png, got {out}")
    check_writable(out, "--out", folder=False)


def check_run(out: Path) -> None:
    """Raise `ValueError` unless a run may live in `out`: new, or one that was interrupted."""
    check_writable(out, "--out", folder=True)
    # With a state beside it the model is that of a run that was interrupted at its very end.
    unfinished = any((out / name).is_dir() for name in ("state", "state.old"))
    if (out / "model.safetensors").exists() and not unfinished:
        raise ValueError(f"--out: {out} holds a finished run; give another folder, or remove this one")
    _check_no_work(out, OTHER_WORK)


def check_beside_data(out: Path, data: str) -> None:
    """Raise `ValueError` where `out` is the folder of the images themselves."""
    if out.is_dir() and out.resolve() == Path(data).resolve():
        raise ValueError(f"--out: {shown(out)} is the folder of the data; give another folder")


def check_series(out: Path) -> None:
    """Raise `ValueError` unless a series of images may live in `out`: a folder without other work."""
    check_writable(out, "--out", folder=True)
    others = {"config.json": "a model", "run.json": "a training run", **OTHER_WORK}
    del others["series.json"]  # which goes on
    _check_no_work(out, others)


def _check_no_work(out: Path, kinds: Mapping[str, str]) -> None:
    """Raise `ValueError` where `out` holds one of these files."""
    for name, kind in kinds.items():
        if (out / name).exists():
            raise ValueError(f"--out: {shown(out)} holds {kind} ({name}); give another folder")


def check_classes(model: NextScaleTransformer, source: str, found: int) -> None:
    """Raise `ValueError` unless a model has as many classes as the images have.

    Args:
        model: VAR or VIAR.
        source: of the images, for the message.
        found: classes of the images.
    """
    known = model.config.num_classes
    if found != known:
        raise ValueError(
            f"--data: {shown(source)} has {found} classes, the model has {known}; give the images "
            "it was trained on"
        )


def check_sampling(
    model: NextScaleTransformer, sampling: Sampling, labels: Sequence[int], flag: str = "--labels"
) -> None:
    """Raise unless a model can sample so, and has those classes.

    Args:
        model: VAR or VIAR.
        sampling: settings of the sampler.
        labels: classes, or one more than the last for none.
        flag: that gives them.

    Raises:
        ValueError, TypeError: what it cannot do.
    """
    if labels:
        try:
            model.check_labels(torch.tensor(labels))
        except ValueError as error:
            raise ValueError(str(error).replace("labels", flag, 1)) from error
        except RuntimeError as error:  # an integer that no tensor holds
            raise ValueError(f"{flag}: expected classes 0 to {model.null_class - 1}, got {labels}") from error
        if model.null_class in labels:
            say(f"{flag}: {model.null_class} asks for no class in particular")
    sampling.schedule(model.trunk)

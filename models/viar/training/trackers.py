"""Where a run's numbers go beside its own file: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` unless the trackers are there; TensorBoard, the default, may be missing.

    Args:
        names: "tensorboard" and "wandb", or one of them.
    """
    if "wandb" in names and not is_wandb_available():
        raise ValueError(
            "TrainConfig: trackers has 'wandb', which is not installed; install it (pip install wandb), or "
            "leave it out"
        )


def start_trackers(
    names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any]
) -> list[GeneralTracker]:
    """The trackers of a run, started; called by the main process alone.

    Args:
        names: see `check_trackers`.
        folder: of the run, in which TensorBoard's files lie in tensorboard/.
        step: where the run starts or goes on; what TensorBoard was told of later steps is dropped.
        settings: of the run, for the trackers that show them.
    """
    trackers: list[GeneralTracker] = []
    if "tensorboard" in names and is_tensorboard_available():
        trackers.append(TensorBoardTracker("tensorboard", folder, purge_step=step + 1))
    if "wandb" in names:
        trackers.append(WandBTracker(f"viar-{settings['kind']}", name=folder.name, dir=folder))
    for tracker in trackers:
        tracker.start()
    if "wandb" in names:
        trackers[-1].store_init_configuration(dict(settings))
    return trackers

"""The state of a run, kept on disk so that a run that is interrupted can go on."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator

SIZES = "sizes.json"  # of a state: bytes of each of its files


@dataclass
class TrainState:
    """Where a run is; saved with it."""

    step: int = 0
    seconds: float = 0.0  # spent training, before interruptions included
    skipped: int = 0  # steps left out, as their loss or gradient was not finite
    skipped_in_row: int = 0  # of those, the last ones
    skipped_longest: int = 0  # of those, the longest row
    measured: int = 0  # step after which held-out data was measured last
    best_loss: float = math.inf  # least loss of held-out data
    best_step: int = 0  # after which that was measured; 0 for none
    stale: int = 0  # measurements since

    def state_dict(self) -> dict[str, float]:
        """For Accelerate's checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """For Accelerate's checkpoint; what a state of an earlier release does not tell stays as it is."""
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, getattr(self, field.name)))


class Checkpoint:
    """A folder with all that a run needs to go on as if nothing had happened: weights, moments, generators.

    It is replaced in steps of which each leaves one whole state behind: the new state is written to
    `folder.new`, the old one is moved to `folder.old`, the new one takes its place, the old one is removed.

    All processes of a run call every method together.

    Args:
        accelerator: with model and optimiser prepared.
        folder: where the state is kept; it need not exist.
        every: seconds between two states.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, every: float) -> None:
        self.accelerator, self.folder, self.every = accelerator, folder, every
        self.state = TrainState()
        self._fresh, self._old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
        self._saved_at, self._saved_step = time.monotonic(), 0
        accelerator.register_for_checkpointing(self.state)

    def restore(self) -> TrainState:
        """Put everything where the last whole state has it, if there is one, and return where the run is.

        Raises:
            ValueError: the state is of another model, or its files are damaged.
        """
        if self.accelerator.is_main_process:
            if self._old.is_dir() and not self.folder.is_dir():  # interrupted between the two moves
                self._old.rename(self.folder)
            for left in (self._fresh, self._old):
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.folder.is_dir():
            self._load()
        self._note()
        return self.state

    def is_due(self) -> bool:
        """Whether the last state is older than `every` by this process's clock, and not the present one."""
        return self.state.step > self._saved_step and time.monotonic() - self._saved_at > self.every

    def save(self) -> None:
        """Replace the state on disk by the present one."""
        self.accelerator.save_state(str(self._fresh))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self._fresh / SIZES).write_text(json.dumps(_sizes(self._fresh)))
            if self.folder.is_dir():
                self.folder.rename(self._old)
            self._fresh.rename(self.folder)
            shutil.rmtree(self._old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._note()

    def remove(self) -> None:
        """Leave no state, for a run that is done; called by the main process alone."""
        if self.folder.is_dir():  # moved first: removed half way, it would not be a state to go on from
            shutil.rmtree(self.folder.rename(self._fresh))

    def _load(self) -> None:
        try:
            _check_sizes(self.folder)
            self.accelerator.load_state(str(self.folder))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a reader of one of the files makes of damage
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{self.folder}: expected the state of this run, found one of another model or damaged files "
                f"({lines[0]}); remove that folder to start over, or give another for the run"
            ) from error

    def _note(self) -> None:
        self._saved_at, self._saved_step = time.monotonic(), self.state.step


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _check_sizes(folder: Path) -> None:
    """Raise `ValueError` unless all files are there to their end.

    Accelerate goes on without a word where it cannot read the states of the generators.
    """
    if not (folder / SIZES).exists():  # a state of a release that kept none
        return
    found = _sizes(folder)
    for name, size in json.loads((folder / SIZES).read_text()).items():
        if found.get(name) != size:
            raise ValueError(f"{name}: {found.get(name, 'no')} bytes instead of {size}")

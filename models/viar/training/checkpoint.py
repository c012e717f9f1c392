"""The state of a run, kept on disk so that a run that is interrupted can go on."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator


@dataclass
class TrainState:
    """Where a run is; saved with it."""

    step: int = 0
    seconds: float = 0.0  # spent training, before interruptions included

    def state_dict(self) -> dict[str, float]:
        """For Accelerate's checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """For Accelerate's checkpoint."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


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
        """Put everything where the last whole state has it, if there is one, and return where the run is."""
        if self.accelerator.is_main_process:
            if self._old.is_dir() and not self.folder.is_dir():  # interrupted between the two moves
                self._old.rename(self.folder)
            for left in (self._fresh, self._old):
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.folder.is_dir():
            self.accelerator.load_state(str(self.folder))
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

    def _note(self) -> None:
        self._saved_at, self._saved_step = time.monotonic(), self.state.step

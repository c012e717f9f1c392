"""The state of a run, kept on disk so that a run that is interrupted can go on.

It holds every tensor whole, however many processes trained it and however they shared the weights, and the
main process alone reads and writes it: a run may go on with another number of processes, and their machines
need no common folder.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from ..files import file_digest, flush, naming
from ..pickles import load_pickled
from ..pretrained import first_line
from ..seeds import LARGEST_SEED, seed_at
from .earlier import is_earlier, read_earlier
from .processes import from_main, to_main

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful  # takes a second to import

FILE, DIGEST = "state.pt", "state.sha256"  # in the folder of a state


@dataclass
class TrainState:
    """Where a run is; saved with it."""

    step: int = 0
    seconds: float = 0.0  # spent training, before interruptions included
    skipped: int = 0  # steps left out, as their loss or gradient was not finite
    rescaled: int = 0  # steps left out, as float16's scale of gradients was too high for them
    skipped_in_row: int = 0  # of both, the last ones
    skipped_longest: int = 0  # of both, the longest row
    measured: int = 0  # step after which held-out data was measured last
    best_loss: float = math.inf  # least loss of held-out data
    best_step: int = 0  # after which that was measured; 0 for none
    best_digest: str = ""  # SHA-256 of the weights that had it; empty where that is not known
    stale: int = 0  # measurements since

    def state_dict(self) -> dict[str, float | str]:
        """For `Checkpoint`."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float | str]) -> None:
        """For `Checkpoint`; what a state of an earlier release does not tell stays as it is."""
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, getattr(self, field.name)))


class Checkpoint:
    """A folder with all that a run needs to go on as if nothing had happened.

    That is models and optimisers, the scaler of float16, what else is registered, and the generators of every
    process. It is replaced in steps of which each leaves one whole state behind: the new state is written to
    `folder.new`, the old one is moved to `folder.old`, the new one takes its place, the old one is removed.
    Each step is on the disk before the next.

    All processes of a run call every method together.

    Args:
        accelerator: that prepared the models and optimisers.
        models: not as wrapped.
        optimizers: of these.
        folder: where the state is kept; it need not exist. The main process's alone.
        every: seconds between two states.
        seed: of the run, for the generators of processes that the state does not know.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        folder: Path,
        *,
        every: float,
        seed: int,
    ) -> None:
        self.accelerator, self.folder, self.every, self.seed = accelerator, folder, every, seed
        self.state = TrainState()
        scalers = [] if accelerator.scaler is None else [accelerator.scaler]
        self._parts: dict[str, list[Any]] = {
            "models": list(models),
            "optimizers": list(optimizers),
            "scalers": scalers,
            "registered": [self.state],
        }
        self._fresh, self._old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
        self._saved_at, self._saved_step = time.monotonic(), 0

    def register(self, part: Stateful) -> None:
        """Keep this too; always in the same order, before `restore`."""
        self._parts["registered"].append(part)

    def restore(self) -> list[str]:
        """Put everything where the last whole state has it, if there is one.

        Returns:
            Lines of text to say.

        Raises:
            ValueError: the state is of another model, or its files are damaged.
        """
        if self.accelerator.is_main_process:
            if self._old.is_dir() and not self.folder.is_dir():  # interrupted between the two moves
                self._old.rename(self.folder)
            for left in (self._fresh, self._old):
                shutil.rmtree(left, ignore_errors=True)
        [found] = broadcast_object_list([self.folder.is_dir()])
        lines = self._load() if found else []
        self._note()
        return lines

    def is_due(self) -> bool:
        """Whether the last state is older than `every` by this process's clock, and not the present one."""
        return self.is_behind() and time.monotonic() - self._saved_at > self.every

    def is_behind(self) -> bool:
        """Whether the last state that was saved is not the present one."""
        return self.state.step > self._saved_step

    def save(self) -> None:
        """Replace the state on disk by the present one."""
        is_main = self.accelerator.is_main_process
        held = {
            name: to_main([part.state_dict() for part in parts], is_main=is_main)
            for name, parts in self._parts.items()
        }
        held["generators"] = gather_object([self._generators()])
        if is_main:
            self._write(held)
        self.accelerator.wait_for_everyone()
        self._note()

    def remove(self) -> None:
        """Leave no state, for a run that is done; called by the main process alone."""
        if self.folder.is_dir():  # moved first: removed half way, it would not be a state to go on from
            shutil.rmtree(self.folder.rename(self._fresh))

    def _write(self, held: dict[str, Any]) -> None:
        try:
            with naming(self.folder):
                self._write_fresh(held)
        except BaseException:
            shutil.rmtree(self._fresh, ignore_errors=True)  # where there is no space, it must not take some
            raise
        if self.folder.is_dir():
            self.folder.rename(self._old)
            flush(self.folder.parent)
        self._fresh.rename(self.folder)
        flush(self.folder.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _write_fresh(self, held: dict[str, Any]) -> None:
        self._fresh.mkdir(parents=True)
        with (self._fresh / FILE).open("wb") as file:  # whose errors tell the cause, unlike those of a name
            torch.save(held, file)
        (self._fresh / DIGEST).write_text(file_digest(self._fresh / FILE))
        for path in (self._fresh / FILE, self._fresh / DIGEST, self._fresh):
            flush(path)

    def _load(self) -> list[str]:
        """What to say of it. The main process reads and tells the others, also of what went wrong."""
        held: dict[str, Any] | str | None = None
        if self.accelerator.is_main_process:
            try:
                held = _read(self.folder)
            except Exception as error:  # whatever a reader of the file makes of damage
                held = first_line(error)
        try:
            held = from_main(held, self._likes(), self.accelerator.device)
            if isinstance(held, str):
                raise ValueError(held)
            return self._put(held)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.folder}: expected the state of this run, found one of another model or damaged files "
                f"({first_line(error)}); remove that folder to start over, or give another for the run"
            ) from error

    def _likes(self) -> dict[str, Any]:
        """Tensors that are shared among the processes as those of a state should be, see `from_main`."""
        moments = [
            {"state": dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))}
            for optimizer in self._parts["optimizers"]
        ]
        return {"models": [model.state_dict() for model in self._parts["models"]], "optimizers": moments}

    def _put(self, held: dict[str, Any]) -> list[str]:
        for kind, parts in self._parts.items():
            for part, state in zip(parts, held[kind], strict=True):
                part.load_state_dict(state)
        generators, count = held["generators"], self.accelerator.num_processes
        rank = self.accelerator.process_index
        # What a state does not have starts elsewhere than it did when the run began.
        torch.manual_seed(seed_at((self.seed + rank) % (LARGEST_SEED + 1), self.state.step))
        if rank < len(generators):
            self._put_generators(generators[rank])
        if count == len(generators):
            return []
        anew = f"; the generators of the last {count - len(generators)} begin anew"
        more = anew if count > len(generators) else ""
        return [f"the run goes on in {count} processes instead of {len(generators)}{more}"]

    def _generators(self) -> dict[str, torch.Tensor]:
        """States of PyTorch's generators in this process, by kind of device."""
        states, kind = {"cpu": torch.get_rng_state()}, self.accelerator.device.type
        if kind != "cpu":
            states[kind] = torch.get_device_module(kind).get_rng_state()
        return states

    def _put_generators(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        kind = self.accelerator.device.type
        if kind != "cpu" and kind in states:
            torch.get_device_module(kind).set_rng_state(states[kind])

    def _note(self) -> None:
        self._saved_at, self._saved_step = time.monotonic(), self.state.step


def _read(folder: Path) -> dict[str, Any]:
    """The state in a folder, as it was written.

    Raises:
        ValueError: it is not as it was written.
    """
    if is_earlier(folder):
        return read_earlier(folder)
    path, wanted = folder / FILE, (folder / DIGEST).read_text()
    if (found := file_digest(path)) != wanted:
        raise ValueError(f"{FILE} has the SHA-256 {found[:8]}... instead of {wanted[:8]}...")
    held: dict[str, Any] = load_pickled(path)
    return held

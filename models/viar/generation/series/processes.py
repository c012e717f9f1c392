"""Processes that make a series together."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

PATIENCE = timedelta(days=30)  # a slow process is no error; one that ended is noticed at once
POLL_EVERY = 0.05  # seconds between two looks at whether all others have arrived


class Processes:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone.

    They talk over gloo whatever the device: a process that ends breaks its connections, and those that wait
    for it get an error.

    Attributes:
        index: of this process, from 0.
        count: of all.
        is_main: whether this is the one that decides, shows progress and writes the archive.
    """

    def __init__(self, device: torch.device) -> None:
        state = PartialState(cpu=device.type == "cpu")
        self.index, self.count = state.process_index, state.num_processes
        self.is_main = self.index == 0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def agree(self, settings: dict[str, Any], decide: Callable[[], Any]) -> Any:
        """What `decide` returns or raises in the main process, once all are known to have the same settings.

        Raises:
            ValueError: two processes have different settings, which the message names.
        """
        for index, theirs in enumerate(self._gather(settings)):
            names = [name for name in settings if theirs[name] != settings[name]]
            if names:
                raise ValueError(
                    f"processes {self.index} and {index} differ in {', '.join(names)}; start all with the "
                    "same models and settings, on machines of one kind"
                )
        verdict: Any = None
        if self.is_main:
            try:
                verdict = decide()
            except (ValueError, OSError) as error:
                verdict = error
        verdict = self._broadcast(verdict)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes have called this; `meanwhile` is called again and again."""
        if self.group is None:
            return
        barrier = dist.barrier(self.group, async_op=True)
        while not barrier.is_completed():
            meanwhile()
            time.sleep(POLL_EVERY)
        barrier.wait()

    def leave(self, value: int) -> list[int]:
        """The values of all processes, by index. The last thing that they do together."""
        values = self._gather(value)
        if self.group is not None:
            dist.destroy_process_group(self.group)
        return values

    def _gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _broadcast(self, value: Any) -> Any:
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

"""Work for stages that run in processes of their own, which load this file and little else."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

DEADLOCK = 60.0  # seconds after which the other stage is taken not to run at the same time


def meet(other: str, folder: Path) -> dict[str, Any]:
    """Wait until stage `other` has begun its work too."""
    (folder / "here").touch()
    end = time.monotonic() + DEADLOCK
    while not (folder.parent / other / "here").exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{folder.name} waits for {other}")
        time.sleep(0.01)
    return {"process": os.getpid(), "threads": torch.get_num_threads()}


def fail_at_once(folder: Path) -> dict[str, Any]:
    raise ValueError("no such luck")

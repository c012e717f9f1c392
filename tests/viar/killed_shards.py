"""Writes tokens in processes that are killed at random instants, until they are all there; no tests.

Run with a folder and a number of kills. The processes are forked from this one, which has imported all that
they need; so it does nothing by itself that starts threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from tiny_models import tiny_tokenizer, uniform

from viar.data import AugmentedImages, ImageData, TensorImages, write_shards


class Ending:
    """Images whose process ends when it asks for one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> NoReturn:
        os._exit(3)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    images, held = (TensorImages(uniform(n, 3, 6, 6) * 2 - 1, torch.arange(n) % 3) for n in (23, 5))
    data = ImageData(AugmentedImages(images, ["rotate", "flip"]), held, 3)
    quiet, sizes = Console(quiet=True), {"crops": 20, "shard_size": 10, "batch_size": 4}
    write = partial(write_shards, tiny_tokenizer(), data, origin={}, console=quiet, **sizes)
    start = time.monotonic()
    write(folder / "whole")
    whole = time.monotonic() - start
    instants = random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if not child:
            write(folder / "killed")
            os._exit(0)
        time.sleep(instants.uniform(0, 2 * whole / kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts = (len(list(folder.glob(f"killed/*.{ending}"))) for ending in ("npy", "sha256", "partial"))
        print(*counts)
    write(folder / "killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

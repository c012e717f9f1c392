"""Commands in processes that can be killed, stopped and short of memory; no tests.

A fork server has imported all that they need, which saves each of them the seconds that this takes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

LIMIT = 300.0  # seconds after which a process is taken to hang

_context = multiprocessing.get_context("forkserver")
_COMMANDS = ("cli", "parsing", "train", "generate", "edit", "convert", "tokenize", "evaluate")
# With what commands import when they are asked for, which takes longer than their work here.
_LATE = (
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.tensor",
    "matplotlib.pyplot",
    "safetensors.torch",
)
_context.set_forkserver_preload(
    ["lives", "tiny_models", *_LATE, *(f"viar.commands.{name}" for name in _COMMANDS)]
)


def live(
    work: Callable[..., None], arguments: Sequence[object], told: Path, environment: Mapping[str, str]
) -> None:
    """What a process does: work, with all that it says in a file."""
    import torch

    with told.open("ab", buffering=0) as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for output in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)


def viar(*arguments: str) -> None:
    """The command `viar`, as a shell would start it."""
    from viar.commands.cli import main

    sys.argv = ["viar", *arguments]
    main()


@dataclass
class Life:
    """A process that does one piece of work.

    Attributes:
        told: file of what it says.
    """

    process: ForkServerProcess
    told: Path

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return not self.process.is_alive()

    def ended(self, seconds: float = LIMIT) -> int:
        """How it ended, within so many seconds: its exit code, below 0 the signal that it died of."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"hangs after {seconds} s: {self.said()[-2000:]}")
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if not self.is_over:
            os.kill(self.pid, number)

    def until(self, there: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Wait until something is there, or the process has ended; whether it is there."""
        limit = time.monotonic() + seconds
        while not there():
            if self.is_over:
                return there()
            assert time.monotonic() < limit, f"waits for nothing: {self.said()[-2000:]}"
            time.sleep(0.001)
        return True

    def said(self) -> str:
        """All that it said."""
        return self.told.read_text()


def begin(
    work: Callable[..., None], *arguments: object, told: Path, environment: Mapping[str, str] | None = None
) -> Life:
    """Start a process."""
    process = _context.Process(target=live, args=(work, arguments, told, environment or {}))
    process.start()
    return Life(process, told)


def save_pair(folder: Path, **changes: int) -> tuple[str, ...]:
    """Write a small VIAR and its tokenizer of images of 8 x 8 and 10 classes; the flags that name them.

    Args:
        folder: for both.
        changes: of the settings of the VIAR.
    """
    from tiny_models import tiny_tokenizer, tiny_transformer

    sides = (1, 2, 4)
    tiny_tokenizer(sides=sides).save_pretrained(folder / "tokenizer")
    tiny_transformer(sides=sides, num_classes=10, **changes).save_pretrained(folder / "viar")
    return ("--model", str(folder / "viar"), "--tokenizer", str(folder / "tokenizer"))


def below(folder: Path) -> list[Path]:
    """All that is in a folder, looked at anew where another process removes a part of it meanwhile."""
    while True:
        try:
            return sorted(folder.rglob("*"))
        except FileNotFoundError:
            continue


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files in a folder, by name; of those that another process removes meanwhile none."""
    found = {}
    for path in below(folder):
        try:
            found[str(path.relative_to(folder))] = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            continue
    return found


def environments(num: int) -> list[dict[str, str]]:
    """What tells processes of one machine of one another, as a launcher does; of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        | {"ACCELERATE_USE_CPU": "true"}
        for rank in range(num)
    ]

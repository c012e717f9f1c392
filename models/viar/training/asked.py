"""A run that is asked to end: by SIGTERM, as schedulers and `kill` send it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LINE = b"SIGTERM: ends after this step, its state saved; a second SIGTERM ends at once\n"
SAME = 0.5  # seconds


@contextmanager
def on_sigterm(do: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM has something done instead of ending this process.

    What the signal did before, it does afterwards. So it does all the time where this is not the main thread,
    which alone is told of signals.

    Args:
        do: called in the main thread; what it raises is raised there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: do())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Asked(SystemExit):
    """The run was asked to end and its state is saved, so the exit code is 0.

    Attributes:
        step: after which it ended.
    """

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while inside, which is said at once, as a step may be long.

    A second SIGTERM does what it did before. One right behind the first is the same: launchers pass on what
    the processes that they started get too.
    """
    asked = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    first = 0.0

    def ask() -> None:
        nonlocal first
        if not asked.is_set():
            first = time.monotonic()
            asked.set()
            # Not through a stream of Python's, which may be writing when the signal comes.
            with suppress(OSError):
                os.write(2, LINE)
        elif time.monotonic() - first > SAME:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    with on_sigterm(ask):
        yield asked

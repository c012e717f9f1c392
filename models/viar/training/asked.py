"""A run that is asked to end: by SIGTERM, as schedulers and `kill` send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while inside, see `on_sigterm`."""
    asked = threading.Event()
    with on_sigterm(asked.set):
        yield asked

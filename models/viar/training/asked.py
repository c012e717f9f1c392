"""A run that is asked to end: by SIGTERM, as schedulers and `kill` send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM sets while inside, instead of ending this process.

    What the signal did before, it does afterwards. So it does all the time where this is not the main thread,
    which alone is told of signals.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)

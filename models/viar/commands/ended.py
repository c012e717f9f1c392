"""A command that is ended from outside, by SIGTERM, as schedulers and `kill` send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .loading import num_processes


class Ended(BaseException):
    """SIGTERM came."""


@contextmanager
def told_of_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises `Ended`, so that no half a file is left; a second ends this process at once.

    Among several processes it ends this one at once as ever: one that waits for another is told of nothing.
    So it does where this is not the main thread.
    """
    if num_processes() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

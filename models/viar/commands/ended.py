"""A command that is ended from outside: by SIGTERM, as schedulers and `kill` send it, or with its like."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist

from ..training.asked import on_sigterm
from .loading import num_processes


class Ended(BaseException):
    """SIGTERM came."""


@contextmanager
def told_of_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises `Ended`, so that no half a file is left; a second ends this process at once.

    Among several processes it ends this one at once as ever: one that waits for another is told of nothing.
    So it does where this is not the main thread.
    """

    def end() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Ended

    with nullcontext() if num_processes() > 1 else on_sigterm(end):
        yield


def lost_another(error: BaseException) -> str | None:
    """What an error says of a process that this one works with and that has ended or does not answer, if so.

    Args:
        error: of anything; gloo's are plain ones of PyTorch, told by the file that they are from.
    """
    text = str(error).strip().partition("\n")[0]
    is_of_gloo = isinstance(error, RuntimeError) and "/gloo/" in text
    if not is_of_gloo and not (dist.is_available() and isinstance(error, dist.DistError)):
        return None
    reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", text)
    return (
        f"another process of this work has ended or does not answer ({reason}); start all of them again, and "
        "they go on from what is saved"
    )

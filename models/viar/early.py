"""What the command `viar` needs before PyTorch is imported, which takes seconds: signals, and streams.

The package imports this first. In a process that is not the command's nothing is done.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, NOBODY_READS, ENDED = 130, 141, 143  # as shells count signals 2, 13 and 15
LINES = {INTERRUPTED: "viar: interrupted", ENDED: "viar: ended by SIGTERM"}
MODULES = ("viar", "viar.commands.cli")  # that `python -m` runs as the command
STREAMS = {1: "standard output", 2: "standard error"}
_HAS_TOLD = False  # how the command ends, which is said once


def prepare(words: Sequence[str] = sys.orig_argv[1:]) -> None:
    """Where this process is the command's, have streams, and end with a line at Ctrl-C and SIGTERM.

    Args:
        words: of the command line, behind the interpreter.
    """
    if not is_command(words):
        return
    fill_streams()
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a shell has those behind `&` ignore it
        signal.signal(signal.SIGINT, _ends_with(INTERRUPTED))
        # What is registered first is done last; then Python takes its handlers away, and is done anyway.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    # Among several processes SIGTERM ends each at once as ever.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, _ends_with(ENDED))


def is_command(words: Sequence[str]) -> bool:
    """Whether a command line runs `viar`: by its script, or by `python -m viar`.

    Args:
        words: behind the interpreter. Of processes that Python starts by itself they are others.
    """
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "-m":
            return following in MODULES
        if not word.startswith("-"):
            return os.path.splitext(os.path.basename(word))[0] == "viar"
        if word == "-c":
            return False
    return False


def fill_streams() -> None:
    """Have standard input, output and error where a shell closed some (`>&-`): what is said there is lost.

    Else a file that is opened gets the number of one that is closed, and messages of libraries with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        raw = _Stream(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",  # for characters that a terminal cannot show
            line_buffering=name == "stderr" or raw.isatty(),
        )
        setattr(sys, name, stream)


class _Stream(io.FileIO):
    """Standard output or error; what cannot be written there is told of it, as errors of files are."""

    def write(self, content: Any, /) -> int:
        """Write."""
        try:
            return super().write(content)
        except OSError as error:
            error.filename = STREAMS[self.fileno()]
            raise


def _ends_with(code: int) -> Callable[[int, FrameType | None], None]:
    """A handler that says why and ends the process, whatever it is at; nothing is raised to be caught."""
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that this one forked ends as it ever did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not _HAS_TOLD:
            with suppress(OSError):
                os.write(2, f"{LINES[code]}\n".encode())
        os._exit(code)

    return end


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` in the command's process, so that no half a file is left.

    A second, which may come while files are put away, ends the process at once.
    """
    before = signal.getsignal(signal.SIGINT)
    if getattr(before, "__module__", None) != __name__:  # not the command's process
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def tell_end(code: int, tell: Callable[[], None]) -> NoReturn:
    """Say how the command ended, once, and exit; a signal meanwhile adds nothing.

    Args:
        code: to exit with.
        tell: says it.

    Raises:
        SystemExit: with the code.
    """
    global _HAS_TOLD
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    own = [name for name, handler in before.items() if getattr(handler, "__module__", None) == __name__]
    for name in own:
        signal.signal(name, signal.SIG_IGN)
    tell()
    _HAS_TOLD = True
    for name in own:
        signal.signal(name, before[name])
    sys.exit(code)

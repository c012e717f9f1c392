"""The command `viar`: which command is asked for, how it ends, and what is said then."""

from __future__ import annotations

import difflib
import os
import re
import select
import sys
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from typing import NoReturn, TextIO

import torch
from rich.console import Console
from rich.markup import escape

import deqlib

from ..data.decoding import shown
from ..early import ENDED, INTERRUPTED, LINES, NOBODY_READS, STREAMS, interruptible, tell_end
from ..launch import check_launch
from ..memory import is_shortage
from .ended import Ended, lost_another, told_of_sigterm
from .loading import process_index
from .table import COMMANDS

# Settings and data that do not fit; files and networks; a loss that is not finite; memory.
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)
EXIT_CODES = """\
exit codes:
  0    done
  1    a fault of this package: a traceback, which is worth a report
  2    settings, files or data that do not fit, said in one line on standard error; flags that the
       parser does not take, in a box there
  130  interrupted by Ctrl-C
  141  who read the output has closed it, such as head
  143  ended from outside by SIGTERM, which a training answers with 0, its state saved; what goes on
       after an interruption goes on after this too
"""


def main() -> None:
    """Entry point: what is wrong with settings, files or data ends with one line and exit code 2.

    Raises:
        SystemExit: the command ended with another code than 0. A traceback is a fault of this package.
    """
    try:
        _run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(INTERRUPTED, *LINES[INTERRUPTED].split(": "))
    except Ended:
        _end(ENDED, *LINES[ENDED].split(": "))
    except (SystemExit, *EXPECTED) as error:
        if nobody_reads(error):
            _lose(sys.stdout)
            sys.exit(NOBODY_READS)
        if isinstance(error, SystemExit) or (text := one_line(error)) is None:
            raise
        from .parsing import by_flags

        if isinstance(error, OSError) and error.filename in STREAMS.values():
            text = f"{error.filename}: {error.strerror}"
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    _lose(stream)
        told = shown(by_flags(text))  # names hold anything
        _end(2, "viar", f"{told}{_of_process()}")


def _end(code: int, name: str, text: str) -> NoReturn:
    """End with a line on standard error, which is lost where nothing can be written there."""

    def tell() -> None:
        try:
            message = f"[red]{name}:[/red] {escape(text)}"  # brackets in an error are no markup
            Console(stderr=True).print(message, highlight=False, soft_wrap=True)
            sys.stderr.flush()
        except OSError:
            _lose(sys.stderr)

    tell_end(code, tell)


def _of_process() -> str:
    """Which of several processes says it, behind what it says."""
    try:
        return f" (process {process_index()})" if process_index() else ""
    except ValueError:  # this is what is to be said
        return ""


def _lose(stream: TextIO) -> None:
    """Lose what could not be written: Python flushes once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> None:
    """Do what is asked for; nothing of a command is imported before that is known."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(overview(), end="")
    elif name == "--version":
        print(f"viar {deqlib.__version__}, PyTorch {torch.__version__}")
    elif name in COMMANDS:
        from .parsing import parsed

        command = parsed(name, arguments[1:])
        check_launch()
        with told_of_sigterm(), interruptible():
            command()
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        way_out = f"is {near[0]} meant?" if near else "viar --help says what they do"
        got = f"got {name!r}" if name else "got none"
        raise ValueError(f"expected a command, one of {', '.join(COMMANDS)}, {got}; {way_out}")


def overview() -> str:
    """The help of `viar` itself."""
    commands = "".join(f"  {name:<15}  {command.summary}\n" for name, command in COMMANDS.items())
    return f"""\
usage: viar [-h] [--version] COMMAND ...

Generate images with an implicit transformer (VIAR) or VAR; train, measure and edit.

commands:
{commands}
viar COMMAND --help lists the flags of a command, with examples. --json behind a command prints its
result as one JSON object.

{EXIT_CODES}"""


def nobody_reads(error: BaseException) -> bool:
    """Whether a command ended because who read its output has closed it.

    Other processes have pipes too, so the output itself is asked.

    Args:
        error: that ended the command.
    """
    if isinstance(error, SystemExit):  # what shows tables makes one of it, and puts another output in place
        return isinstance(error.__context__, BrokenPipeError)
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):  # Windows has none
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def one_line(error: Exception) -> str | None:
    """What an error says, on one line; `None` where it is none that a user can mend."""
    text = str(error)
    if is_shortage(error):
        return f"memory does not suffice ({text.strip().partition(chr(10))[0]}); make model or batch smaller"
    if of_another := lost_another(error):
        return of_another
    if isinstance(error, BrokenExecutor) or text.startswith("DataLoader worker"):
        return f"another process of this command was ended from outside ({text}); is there memory for it?"
    if isinstance(error, RuntimeError):
        return None
    if "Original Traceback" in text:  # of a process that reads pictures: the error itself is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return re.sub(r"\s*\n\s*", " ", text.strip()) or type(error).__name__


if __name__ == "__main__":
    main()

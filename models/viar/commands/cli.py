"""The command `viar`: flags come from the signatures and typed dataclasses of the commands.

A new command is a function in a file of its own and a line of `COMMANDS`.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import redirect_stderr
from functools import partial, wraps
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.extras import SubcommandApp

from ..data.decoding import shown
from ..memory import is_shortage
from . import app, convert, demo, edit, evaluate, generate, reproduce, tokenize, train
from .flags import given_flags
from .loading import process_index

# In the order that the help shows.
COMMANDS: dict[str, Callable[..., None]] = {
    "train-tokenizer": train.train_tokenizer_command,
    "tokenize": tokenize.tokenize_command,
    "train": train.train_command,
    "generate": generate.generate_command,
    "evaluate": evaluate.evaluate_command,
    "reproduce": reproduce.reproduce_command,
    "edit": edit.edit_command,
    "app": app.app_command,
    "convert": convert.convert_command,
    "demo": demo.demo_command,
}


# Settings and data that do not fit; files and networks; a loss that is not finite; memory.
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)
# How messages of settings begin: "TrainConfig: lr must be positive, got 0".
OF_SETTINGS = re.compile(r"[A-Z]\w+: |viar \w+: ")


def one_line(error: Exception) -> str | None:
    """What an error says, on one line; `None` where it is none that a user can mend."""
    text = str(error)
    if is_shortage(error):
        return f"memory does not suffice ({text.strip().partition(chr(10))[0]}); make model or batch smaller"
    if isinstance(error, BrokenExecutor) or text.startswith("DataLoader worker"):
        return f"another process of this command was ended from outside ({text}); is there memory for it?"
    if isinstance(error, RuntimeError):
        return None
    if "Original Traceback" in text:  # of a process that reads pictures: the error itself is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return re.sub(r"\s*\n\s*", " ", text.strip()) or type(error).__name__


def parsed(app: SubcommandApp) -> Callable[[], None]:
    """The command that was asked for, with its settings.

    Raises:
        ValueError: settings that their own check refuses, which the parser would show in a box of several
            lines, by names of its own.
        SystemExit: what else the parser ends with, such as help, or a flag that is not there.
    """
    held = io.StringIO()
    try:
        with redirect_stderr(held):
            work: Callable[[], None] = app.cli(prog="viar", config=(tyro.conf.CascadeSubcommandArgs,))
    except SystemExit as ended:
        text = _refused(ended)
        if text is None:
            sys.stderr.write(held.getvalue())
            raise
        raise ValueError(text) from ended
    sys.stderr.write(held.getvalue())
    return work


def _refused(ended: SystemExit) -> str | None:
    """What the own check of settings said, if that is why the parser ended."""
    error: BaseException | None = ended
    while error is not None:
        if isinstance(error, ValueError) and OF_SETTINGS.match(str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def by_flags(text: str) -> str:
    """What settings refuse, behind the flags on the command line that it is about, if it is about some."""
    if not OF_SETTINGS.match(text):
        return text
    words = set(re.findall(r"\w+", text))
    flags = sorted(flag.replace("_", "-") for flag in given_flags() if flag.rpartition(".")[2] in words)
    return f"{', '.join(f'--{flag}' for flag in flags)}: {OF_SETTINGS.sub('', text)}" if flags else text


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The same signature and help, but the work is returned: parsing and work are two things then."""

    # The parser reads the docstring of the command itself. It keeps line ends within the text of a flag, and
    # before a line that begins with no letter.
    command.__doc__ = re.sub(r"\n(?: {8}(?=\S)|(?=--))", " ", inspect.cleandoc(command.__doc__ or ""))

    @wraps(command)
    def take(*values: Any, **settings: Any) -> Callable[[], None]:
        return partial(command, *values, **settings)

    return take


def main() -> None:
    """Entry point: what is wrong with settings, files or data ends with one line and exit code 2.

    A traceback is a fault of this package.
    """
    app = SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(_later(command))
    try:
        parsed(app)()
    except EXPECTED as error:
        text = one_line(error)
        if text is None:
            raise
        process = f" (process {process_index()})" if process_index() else ""
        told = escape(shown(by_flags(text)))  # brackets in an error are no markup, and names hold anything
        message = f"[red]viar:[/red] {told}{process}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]viar:[/red] interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

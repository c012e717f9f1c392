"""The command `viar`: flags come from the signatures and typed dataclasses of the commands.

A new command is a function in a file of its own and a line of `COMMANDS`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from tyro.extras import SubcommandApp

from . import convert, demo, edit, evaluate, generate, tokenize, train
from .loading import process_index

# In the order that the help shows.
COMMANDS: dict[str, Callable[..., None]] = {
    "train-tokenizer": train.train_tokenizer_command,
    "tokenize": tokenize.tokenize_command,
    "train": train.train_command,
    "generate": generate.generate_command,
    "evaluate": evaluate.evaluate_command,
    "edit": edit.edit_command,
    "convert": convert.convert_command,
    "demo": demo.demo_command,
}


# Settings and data that do not fit; files and networks; a loss that is not finite; memory.
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)
# What PyTorch says in a plain RuntimeError where memory does not suffice.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def one_line(error: Exception) -> str | None:
    """What an error says, on one line; `None` where it is none that a user can mend."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text.lower() for words in OUT_OF_MEMORY)
    ):
        return f"memory does not suffice ({text.strip().partition(chr(10))[0]}); make model or batch smaller"
    if isinstance(error, BrokenExecutor) or text.startswith("DataLoader worker"):
        return f"another process of this command was ended from outside ({text}); is there memory for it?"
    if isinstance(error, RuntimeError):
        return None
    if "Original Traceback" in text:  # of a process that reads pictures: the error itself is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return re.sub(r"\s*\n\s*", " ", text.strip()) or type(error).__name__


def main() -> None:
    """Entry point: what is wrong with settings, files or data ends with one line and exit code 2.

    A traceback is a fault of this package.
    """
    app = SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(command)
    try:
        app.cli(prog="viar", config=(tyro.conf.CascadeSubcommandArgs,))
    except EXPECTED as error:
        text = one_line(error)
        if text is None:
            raise
        process = f" (process {process_index()})" if process_index() else ""
        message = f"[red]viar:[/red] {escape(text)}{process}"  # brackets in an error are no markup
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]viar:[/red] interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

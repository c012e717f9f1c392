"""The command `viar`: flags come from the signatures and typed dataclasses of the commands.

A new command is a function in a file of its own and a line of `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

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


def main() -> None:
    """Entry point: bad settings end with a message and exit code 2, not with a traceback."""
    app = SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(command)
    try:
        app.cli(prog="viar", config=(tyro.conf.CascadeSubcommandArgs,))
    except (ValueError, OSError) as error:
        process = f" (process {process_index()})" if process_index() else ""
        message = f"[red]viar:[/red] {escape(str(error))}{process}"  # brackets in an error are no markup
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]viar:[/red] interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

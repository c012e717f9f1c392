"""`viar completion`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

from .parsing import completion_script

Shell = Literal["bash", "zsh", "fish", "tcsh"]


def completion_command(
    shell: Annotated[tyro.conf.Positional[Shell], tyro.conf.arg(metavar="{bash,zsh,fish,tcsh}")],
) -> None:
    """Print a script that completes commands, recipes, flags and their choices in a shell.

    Put it where the shell looks for such: bash into ~/.local/share/bash-completion/completions/viar, zsh into
    a file _viar in a folder of fpath, fish into ~/.config/fish/completions/viar.fish. Print it anew after an
    update.

    Args:
        shell: The shell.
    """
    print(completion_script(shell))

"""`viar convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoints.convert import convert_checkpoint, describe
from ..data.decoding import shown
from ..files import check_writable
from .flags import check_not_empty


def convert_command(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    sides: tuple[int, ...] = (),
    num_heads: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a published checkpoint into a folder that the other commands read, or such a folder into one.

    Args:
        source: File with a published tokenizer, VAR or VIAR (.pth, .safetensors), or a folder.
        out: Folder; or file ending in .safetensors or .pth.
        sides: Of a published tokenizer off the 256-pixel ladder.
        num_heads: Of a published transformer without a learned attention scale; default width / 64.
        overwrite: Replace what out holds.
    """
    check_not_empty(sides=sides)
    if not (out.is_file() or out.is_dir()):  # what is there is looked at by the conversion
        check_writable(out, "out", folder=source.is_file())
    model = convert_checkpoint(source, out, sides=sides or None, num_heads=num_heads, overwrite=overwrite)
    table = Table(title=Text(shown(out)), show_header=False)
    for name, value in describe(model).items():
        table.add_row(name, value)
    Console().print(table)

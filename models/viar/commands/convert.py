"""`viar convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..checkpoints.convert import convert_checkpoint, describe
from ..data.decoding import shown
from ..files import check_writable
from .flags import check_not_empty, without
from .output import report


def convert_command(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    sides: Annotated[tuple[int, ...], without("those of 256 pixels, 1 2 3 4 5 6 8 10 13 16")] = (),
    num_heads: Annotated[int | None, without("width / 64")] = None,
    overwrite: bool = False,
) -> None:
    """Turn a published checkpoint into a folder that the other commands read, or such a folder into one.

    Args:
        source: File with a published tokenizer, VAR or VIAR (.pth, .safetensors), or a folder.
        out: Folder; or file ending in .safetensors or .pth.
        sides: Of a published tokenizer: the side of each of its maps of tokens, rising.
        num_heads: Heads of attention of a published transformer without a learned attention scale.
        overwrite: Replace what out holds.
    """
    check_not_empty(sides=sides)
    if not (out.is_file() or out.is_dir()):  # what is there is looked at by the conversion
        check_writable(out, "out", folder=source.is_file())
    console = Console()
    with console.status(f"converting {escape(shown(source))}"):
        model = convert_checkpoint(source, out, sides=sides or None, num_heads=num_heads, overwrite=overwrite)
    told = describe(model)
    if report({"out": out, **told}):
        return
    table = Table(title=Text(shown(out)), show_header=False)
    for name, value in told.items():
        table.add_row(name, value)
    console.print(table)

"""Files that are whole or not there: written under another name first, then moved to their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is whole, and is gone if it never is."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The same for writers that ask for a name, not an open file, and for those that write a folder.

    Yields a path of the same name in a new folder beside `path`; its parents are made. A file, or a folder
    where none was, takes the place of `path`. Of a folder that is there, each file that was written is
    replaced, and the others stay.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        fresh = Path(folder, path.name)
        yield fresh
        if path.is_dir():  # It may be somebody's working directory, so even an empty one is not replaced.
            for file in fresh.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(fresh, path)

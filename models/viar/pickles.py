"""Files of `torch.save`, read without running code and in no more memory than what they hold."""

from __future__ import annotations

import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The one thing that PyTorch's reader makes at a size that the file names, whatever the file holds.
_OF_ANY_SIZE = b"bytearray\n"


class HoldsCode(ValueError):
    """A file has code in it, which is not run."""


def load_pickled(
    path: Path, *, mapped: bool = False, look: Callable[[Path], None] = lambda path: None
) -> Any:
    """What a file of `torch.save` holds, its tensors on the CPU.

    Args:
        path: of the file.
        mapped: tensors stay mapped to the file, if its kind allows that.
        look: called with an archive once it is known to unpack to no more than its size; it may raise.

    Raises:
        HoldsCode: the file has code in it.
        ValueError: the file would take more memory than its size, or is none of `torch.save`.
        Exception: whatever the reader makes of damage.
    """
    check_pickled(path)
    is_archive = zipfile.is_zipfile(path)  # files that torch before 1.6 saved are none, and cannot be mapped
    if is_archive:
        look(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # PyTorch's text says how to read the file all the same, which would run what is in it.
        if code := re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE):
            raise HoldsCode(
                f"holds {code[1]}, which is code and not a tensor, and code is not run"
            ) from error
        if "weights_only" in str(error) or "Weights only" in str(error):
            what = "a program of TorchScript" if "TorchScript" in str(error) else "no file of torch.save"
            raise ValueError(f"it is {what}") from error
        raise


def check_pickled(path: Path) -> None:
    """Raise `ValueError` where a file of `torch.save` would take more memory than its size.

    Args:
        path: of the file.
    """
    if zipfile.is_zipfile(path):
        _check_archive(path)
    elif _holds(path, _OF_ANY_SIZE):
        raise ValueError("holds a bytearray, which is no tensor")


def _check_archive(path: Path) -> None:
    """Raise `ValueError` where entries are larger than the file: `torch.save` packs none."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("holds packed entries, which torch.save does not write; save it again with it")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("tells of more bytes than it has")
        for entry in entries:
            if entry.filename.endswith("data.pkl") and _OF_ANY_SIZE in archive.read(entry):
                raise ValueError("holds a bytearray, which is no tensor")


def _holds(path: Path, text: bytes) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0

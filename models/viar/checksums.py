"""Files whose content is held against a checksum: tensors and settings get one, archives and PNG have theirs.

Damage that leaves a file readable is told by it. Files of safetensors and JSON of earlier releases, and of
others, have none and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# What a damaged archive, one with a password, or one packed in a way of its own makes readers raise.
OF_DAMAGED_ARCHIVES = (
    ArithmeticError,
    SyntaxError,
    TypeError,
    TokenError,
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
CHECKSUM = "sha256"  # its name among the metadata of tensors and among settings


def digest_of(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """SHA-256 of names, types, shapes and values, in hexadecimal digits, whatever device they are on.

    Args:
        tensors: of any shape.
        settings: text that counts too.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, settings: str = "") -> None:
    """Write a file of safetensors with the checksum of what is in it.

    Args:
        tensors: of any shape.
        path: of the file.
        settings: text kept elsewhere, without which they are of no use; `load_tensors` wants the same.
    """
    # And no more: safetensors writes several in any order.
    metadata = {CHECKSUM: digest_of(tensors, settings)}
    path.touch()  # with the mode that any new file has: safetensors makes one that its owner alone may read
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def load_tensors(
    path: Path, settings: str = "", look: Callable[[dict[str, Tensor]], None] = lambda tensors: None
) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, on the CPU.

    Args:
        path: of the file.
        settings: as when they were saved.
        look: called with the tensors before their checksum is looked at; it may raise what tells more.

    Raises:
        SafetensorError: the file is cut off, or something else.
        ValueError: it has a checksum, and holds or goes with something else than was saved.
        OSError: it cannot be read.
    """
    with safe_open(path, "pt") as file:
        wanted = (file.metadata() or {}).get(CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    look(tensors)
    if wanted is not None and (found := digest_of(tensors, settings)) != wanted:
        beside = " or what is kept beside it" if settings else ""
        raise ValueError(
            f"{path.name}{beside} is damaged or was changed (SHA-256 {found[:8]}... instead of "
            f"{wanted[:8]}...); fetch or make it again"
        )
    return tensors


def to_json(values: Mapping[str, Any]) -> bytes:
    """A file of JSON with a checksum among its values.

    Args:
        values: such as JSON has, by name.
    """
    return json.dumps({**values, CHECKSUM: checksum_of(values)}, indent=1).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Values by name in a file of JSON, which may come from anybody; without the checksum.

    Args:
        path: of the file.

    Raises:
        ValueError: it holds something else, is damaged, or has a checksum and is not what was written; the
            caller names the file.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("lists or names within one another, too deep to be read") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected settings by name, found {type(values).__name__}")
    wanted = values.pop(CHECKSUM, None)
    if wanted is not None and wanted != checksum_of(values):
        raise ValueError("what is in it is not what was written")
    return values


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The kind of each chunk of a PNG, and whether it is whole and as its CRC-32 says.

    Args:
        file: read from its beginning; afterwards it stands where it did.
    """
    before = file.tell()
    try:
        file.seek(len(PNG_BEGIN))
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            content, told = file.read(size), file.read(4)
            yield kind, told == struct.pack(">I", zlib.crc32(kind + content))
    finally:
        file.seek(before)


def checksum_of(values: Mapping[str, Any]) -> str:
    """What `to_json` adds to values, by the name `CHECKSUM`, and `read_json` looks at.

    Args:
        values: such as JSON has, by name.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

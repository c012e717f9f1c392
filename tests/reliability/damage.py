"""Ways to damage a file: emptied, swapped, a bit flipped, cut at a border of its structure and anywhere."""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from random import Random


def borders(content: bytes) -> list[int]:
    """Lengths at which a part of a file ends: chunks, entries of an archive, tensors, or words."""
    if content.startswith(b"\x89PNG"):
        return _chunks(content)
    if content.startswith(b"PK"):
        return _entries(content)
    if content.startswith(b"\x93NUMPY"):
        return [6, 8, 10, content.index(b"\n") + 1, len(content) - 1]
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and size + 8 <= len(content):
        return _tensors(content, size)
    return [match.end() for match in re.finditer(rb"[{\[,:\n]", content)]


def _chunks(content: bytes) -> list[int]:
    places, at = [8], 8
    while at < len(content):
        at += struct.unpack_from(">I", content, at)[0] + 12
        places += [at - 4, at]
    return places[:-1]


def _entries(content: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        starts = [entry.header_offset for entry in archive.infolist()]
        ends = [at + 30 for at in starts] + [entry.compress_size for entry in archive.infolist()]
        return sorted({*starts, *ends, archive.start_dir, len(content) - 22} & set(range(len(content))))


def _tensors(content: bytes, size: int) -> list[int]:
    header = json.loads(content[8 : 8 + size])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return [8, 8 + size, *sorted(8 + size + end for end in ends)][:-1]


def damages(content: bytes, others: Sequence[bytes], random: Random) -> Iterator[tuple[str, bytes]]:
    """Without end: how it was damaged, in words, and what is left; whatever it is, not what it was.

    Args:
        content: of the file.
        others: of files that may lie in its place.
        random: where to damage it.
    """
    yield _flipped(content, random)
    yield "empty", b""
    yield from (("swapped", other) for other in others if other != content)
    ends = iter(random.sample(places := borders(content), len(places)))
    for number in itertools.count():
        kind = number % 4
        end = next(ends, None) if kind == 0 else None
        if end is not None:
            yield f"cut at the border {end}", content[:end]
        elif kind == 1:
            end = random.randrange(len(content))
            yield f"cut at {end}", content[:end]
        else:
            yield _flipped(content, random)


def _flipped(content: bytes, random: Random) -> tuple[str, bytes]:
    place = random.randrange(8 * len(content))
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    return f"bit {place} flipped", bytes(flipped)

"""Files spoiled at random, as a disk, a network or somebody with intent would: bytes, and what they mean."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Spoil = Callable[[random.Random, bytes], bytes]

# What readers take for sizes, counts and types.
NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    65535,
    2**16,
    10**6,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**60,
    2**63 - 1,
    2**63,
    10**30,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(
        None,
        True,
        False,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\x1b[31m",
        "../../a",
        "\ud800",
    ),
    *([], {}, [1], [[1]], {"a": 1}, [0] * 1000, "x" * 10_000),
)


PACKED = tuple(zlib.compress(bytes(size)) for size in (10, 2 * 10**6))


def spoiled(draw: random.Random, content: bytes, structure: Spoil | None = None) -> bytes:
    """The content of a file with one to three things changed, half of them in its structure if it has one."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = structure if structure is not None and draw.random() < 0.5 else spoiled_bytes
        content = change(draw, content)
    return content


def spoiled_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bits flipped; cut; parts left out, put in or doubled; numbers replaced, of 1 to 8 bytes or as text."""
    if not content:
        return draw.randbytes(draw.randrange(64))
    where = draw.randrange(len(content))
    length = min(1 + int(draw.expovariate(0.1)), len(content) - where)
    kind = draw.randrange(7)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:where]
    if kind == 2:
        return content[:where] + content[where + length :]
    if kind == 3:
        return content[:where] + draw.randbytes(length) + content[where:]
    if kind == 4:
        other = draw.randrange(len(content))
        return content[:other] + content[where : where + length] + content[other:]
    if kind == 5:
        width = draw.choice((1, 2, 4, 8))
        number = (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, draw.choice(("big", "little")))
        return content[:where] + number + content[where + width :]
    numbers = list(re.finditer(rb"\d+", content[:4096]))
    if not numbers:
        return content[where:]
    found = draw.choice(numbers)
    return content[: found.start()] + str(draw.choice(NUMBERS)).encode() + content[found.end() :]


def spoiled_json(draw: random.Random, content: bytes) -> bytes:
    """A value somewhere in it replaced, left out or put under another name, or all of it put deeper."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return spoiled_bytes(draw, content)
    if draw.random() < 0.02:
        depth = draw.choice((10, 10_000))
        return b"[" * depth + content + b"]" * depth
    return json.dumps(_changed(draw, value)).encode()


def _changed(draw: random.Random, value: Any) -> Any:
    deeper = draw.random() < 0.8
    if isinstance(value, dict) and value and deeper:
        name = draw.choice(list(value))
        rest = {key: kept for key, kept in value.items() if key != name}
        kind = draw.randrange(8)
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, draw.choice(("", name + "x", "trunk", "step")): value[name]}
        return {**value, name: _changed(draw, value[name])}
    if isinstance(value, list) and value and deeper:
        index = draw.randrange(len(value))
        changed = [] if draw.random() < 0.1 else [_changed(draw, value[index])]
        return value[:index] + changed + value[index + 1 :]
    return draw.choice(VALUES)


def spoiled_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Its header of JSON changed, and its length as it is then, or not."""
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    header = spoiled_json(draw, content[8 : 8 + length])
    told = len(header) if draw.random() < 0.8 else draw.choice(NUMBERS) % 2**64
    return struct.pack("<Q", told) + header + content[8 + length :]


def spoiled_png(draw: random.Random, content: bytes) -> bytes:
    """A chunk changed, its checksum as it is then; or one that tells of much put before the others."""
    chunks = _chunks(content)
    if not chunks:
        return spoiled_bytes(draw, content)
    index = draw.randrange(len(chunks))
    name, data = chunks[index]
    if draw.random() < 0.3:
        packed = draw.choice(PACKED)
        added = draw.choice((b"zTXt", b"iCCP", b"iTXt", b"eXIf", b"tRNS", b"acTL", b"pHYs", b"gAMA", b"sRGB"))
        start = b"a\0\0" if added != b"iTXt" else b"a\0\1\0\0\0"
        chunks.insert(
            1, (added, start + packed if draw.random() < 0.7 else draw.randbytes(draw.randrange(40)))
        )
    else:
        chunks[index] = (name, spoiled_bytes(draw, data))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of the chunks of a PNG, as far as they are whole."""
    found, place = list[tuple[bytes, bytes]](), 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        if place + 12 + length > len(content):
            break
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def spoiled_archive(draw: random.Random, content: bytes) -> bytes:
    """An entry of a zip changed, left out, doubled, packed or of another name; whole again after it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # of what was spoiled before
        return spoiled_bytes(draw, content)
    if not entries:
        return spoiled_bytes(draw, content)
    index = draw.randrange(len(entries))
    name, data = entries[index]
    kind = draw.randrange(6)
    if kind == 0:
        del entries[index]
    elif kind == 1:
        entries[index] = (
            draw.choice(("../" + name, "/tmp/" + name, name + "x", "arr_0.npy", "mu.npy")),
            data,
        )
    elif kind == 2:
        entries[index] = (name, data + b"\0" * draw.choice((1, 10**6)))
    else:
        entries[index] = (name, spoiled_bytes(draw, data))
    packing = zipfile.ZIP_DEFLATED if draw.random() < 0.2 else zipfile.ZIP_STORED
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packing) as archive:
        for entry, held in entries:
            archive.writestr(zipfile.ZipInfo(entry), held, packing)
    return written.getvalue()

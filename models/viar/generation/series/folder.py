"""The folder of a series: numbered pictures, the settings they were made with, an archive of them all."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...checksums import OF_DAMAGED_ARCHIVES, PNG_BEGIN, png_chunks, read_json, to_json
from ...data.decoding import decode_picture
from ...files import replacing

SETTINGS = "series.json"
FORMAT = 1  # of a series; to be raised with whatever changes the images of given settings
READ_AT_ONCE = 256  # pictures held while the archive is written

MEMBERS = {"arr_0.npy", "arr_1.npy"}  # of the archive
_NUMBERED = re.compile(r"[0-9]{6,18}\.png")
# A whole PNG ends with this chunk.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class SeriesFolder:
    """Where a series lives.

    Pictures are called 000000.png, 000001.png, ... whatever their number, so a series can grow. Every file
    is written under another name first: one that is there is whole.

    Attributes:
        path: the folder.
        side: pixels a side of its pictures.
    """

    path: Path
    side: int

    def picture(self, index: int) -> Path:
        """File of an image."""
        return self.path / f"{index:06d}.png"

    def archive(self, num: int) -> Path:
        """File of the first `num` images together, named as the published ones are."""
        return self.path / f"samples_{num}x{self.side}x{self.side}x3.npz"

    def has_archive(self, num: int) -> bool:
        """Whether the archive of the first `num` images is there and what was written; reads all of it."""
        path = self.archive(num)
        try:
            with zipfile.ZipFile(path) as archive:
                return set(archive.namelist()) == MEMBERS and archive.testzip() is None
        except OF_DAMAGED_ARCHIVES:
            return False

    def prepare(self, settings: dict[str, Any], num: int, formats: Sequence[str]) -> list[int]:
        """Begin in the folder, or go on in one of the same settings; indices below `num` of images to make.

        The folder is there, and `held`. A picture that is no whole PNG of the right size is to be made again.

        Raises:
            ValueError: the folder holds images made with other settings, or with none that it tells.
        """
        settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        there = self._indices()
        if there or any(self.path.glob("samples_*.npz")):
            self._compare(settings)
        with replacing(self.path / SETTINGS) as file:
            file.write(to_json(settings))
        if "png" not in formats and self.has_archive(num):
            return []
        missing = [i for i in range(num) if i not in there or not self._is_whole(self.picture(i))]
        for index in there.intersection(missing):
            self.picture(index).unlink()
        return missing

    def count(self, num: int) -> int:
        """How many of the first `num` pictures are there."""
        return sum(index < num for index in self._indices())

    def write(self, index: int, pixels_HWC: np.ndarray) -> None:
        """Write a picture, uint8."""
        with replacing(self.picture(index)) as file:
            Image.fromarray(pixels_HWC).save(file, "png")

    def read(self, index: int) -> np.ndarray:
        """Read a picture, (H, W, 3) uint8.

        Raises:
            ValueError: it is damaged.
        """
        path = self.picture(index)
        try:
            if not self._is_whole(path):
                raise OSError("it is not what was written")
            pixels_HWC = np.asarray(decode_picture(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged ({error}); remove it and run again") from error
        if pixels_HWC.shape != (self.side, self.side, 3):
            raise ValueError(f"{path}: expected {self.side} pixels a side; remove it and run again")
        return pixels_HWC

    def write_archive(self, num: int, labels: Iterable[int], pool: Executor) -> None:
        """Write the first `num` images and their labels as arr_0 (N, H, W, 3) uint8 and arr_1 (N,) int64.

        Only some images are held in memory at a time, and the same images give the same file.

        Raises:
            ValueError: a picture is damaged.
        """
        arrays: tuple[tuple[str, type[np.generic], tuple[int, ...], Iterable[np.ndarray]], ...] = (
            ("arr_0.npy", np.uint8, (num, self.side, self.side, 3), self._read_all(num, pool)),
            ("arr_1.npy", np.int64, (num,), [np.fromiter(labels, np.int64, num)]),
        )
        with replacing(self.archive(num)) as file, zipfile.ZipFile(file, "w") as archive:
            for name, dtype, shape, parts in arrays:
                # A member opened by its name would get today's date, and the file would change with it.
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                    header = {
                        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                        "fortran_order": False,
                        "shape": shape,
                    }
                    np.lib.format.write_array_header_1_0(member, header)
                    for part in parts:
                        member.write(part.tobytes())

    def remove_pictures(self, num: int) -> None:
        """Remove the first `num` pictures."""
        for index in range(num):
            self.picture(index).unlink(missing_ok=True)

    def _read_all(self, num: int, pool: Executor) -> Iterator[np.ndarray]:
        for start in range(0, num, READ_AT_ONCE):
            yield from pool.map(self.read, range(num)[start : start + READ_AT_ONCE])

    def _indices(self) -> set[int]:
        names = {entry.name for entry in os.scandir(self.path)}
        numbers = {int(name[:-4]) for name in names if _NUMBERED.fullmatch(name)}
        return {number for number in numbers if self.picture(number).name in names}

    def _is_whole(self, path: Path) -> bool:
        head = struct.pack(">8sI4sIIBB", PNG_BEGIN, 13, b"IHDR", self.side, self.side, 8, 2)
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                return False
            chunks = list(png_chunks(file))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return all(is_sound for _, is_sound in chunks) and file.read() == _PNG_END

    def _compare(self, settings: dict[str, Any]) -> None:
        """Raise `ValueError` unless the images of this folder were made with `settings`."""
        path = self.path / SETTINGS
        if not path.exists():
            raise ValueError(
                f"{self.path} holds numbered pictures or an archive, and no {SETTINGS} that tells how they "
                "were made; give another folder"
            )
        try:
            found = read_json(path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: unreadable ({error}); give another folder") from error
        names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if names:
            listed = "; ".join(
                f"{name}: {_short(found.get(name))} there, {_short(settings.get(name))} now" for name in names
            )
            raise ValueError(
                f"{self.path} holds images made with other settings; give another folder, or these "
                f"settings as they were: {listed}"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-16:]}"

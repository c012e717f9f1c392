"""Tokens of a data set on disk: written once by a tokenizer, trained on as often as one likes.

A folder holds `shards.json`, all that the tokens depend on, and for the training and the held-out images
files of a fixed number of rows: `train-00000.npy`, ..., `validation-00000.npy`, ... A row is the tokens of
all scales and the label; files are mapped into memory, so that a data set may be larger than that. Beside
each lies `NAME.sha256`, written last: a file without it is not whole, and is made again. Which files there
are and what is in each follows from the settings: no process has to ask another or to read an index.

Shape letters: B batch, L tokens of all scales.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checksums import read_json
from ..files import file_digest
from ..kinds import check_fields, checked
from ..model.config import check_at_least
from ..model.scales import check_sides
from ..pretrained import fingerprint
from ..tokenizer import Tokenizer

SETTINGS = "shards.json"
FORMAT = 1  # to be raised with whatever changes the rows of given settings
SPLITS = ("train", "validation")

MOST_FILES, MOST_TOKENS = 10**6, 2**24  # of a split, and of a row

TokenRows = tuple[Tensor, Tensor]  # tokens of all scales (B, L) int64, labels (B,) int64


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """All that the rows of a folder depend on, as `shards.json` holds it.

    Attributes:
        tokenizer: fingerprint of its config and weights.
        sides: of its scales.
        codebook_size: V.
        num_classes: N; labels are 0 to N - 1.
        origin: where the images come from, in plain values.
        images: how many there are to train on, and held out.
        crops: rows of each training image, each drawn anew.
        seed: of what is drawn.
        shard_size: rows of a file; the last one may have fewer.
        batch_size: images encoded at a time: in another batch sums are rounded otherwise, and of two codes
            that are equally near another is taken.
        format: of the folder.
        class_names: of label 0, 1, ...; empty where they are not known.
        augmentations: names of those that training images went through.
    """

    tokenizer: str
    sides: tuple[int, ...]
    codebook_size: int
    num_classes: int
    origin: Mapping[str, Any]
    images: tuple[int, int]
    crops: int
    seed: int
    shard_size: int
    batch_size: int
    format: int = FORMAT
    class_names: tuple[str, ...] = ()
    augmentations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate: what a file tells may be anything."""
        check_fields(self)
        owner = "tokens"
        check_sides(owner, self.sides)
        check_at_least(owner, 0, train=self.images[0], validation=self.images[1], seed=self.seed)
        check_at_least(owner, 1, crops=self.crops, shard_size=self.shard_size, batch_size=self.batch_size)
        check_at_least(owner, 1, codebook_size=self.codebook_size, num_classes=self.num_classes)
        num_files = max(self.rows(split) for split in SPLITS) // self.shard_size
        if num_files > MOST_FILES:
            raise ValueError(f"{owner}: expected at most {MOST_FILES:,} files, got {num_files:,}")
        if (num_tokens := sum(side * side for side in self.sides)) > MOST_TOKENS:
            raise ValueError(f"{owner}: expected at most {MOST_TOKENS:,} tokens a row, got {num_tokens:,}")

    def rows(self, split: str) -> int:
        """Rows of a split."""
        train, validation = self.images
        return train * self.crops if split == "train" else validation

    def shards(self, split: str) -> list[tuple[str, range]]:
        """Name of each file of a split, and its rows."""
        rows = range(self.rows(split))
        starts = range(0, len(rows), self.shard_size)
        return [(f"{split}-{i:05d}.npy", rows[s : s + self.shard_size]) for i, s in enumerate(starts)]

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Of a row."""
        token = np.uint16 if self.codebook_size <= 2**16 else np.int32
        num_tokens = sum(side * side for side in self.sides)
        return np.dtype([("tokens", token, (num_tokens,)), ("label", np.int32)])


class TokenShards(Dataset[TokenRows]):
    """Rows of tokens in a folder of `write_shards`, served a batch at a time.

    Opening looks at the sizes of the files alone; `verify` reads them. A file is mapped into memory when the
    first of its rows is asked for, in each process those that it reads.

    Args:
        folder: with `shards.json`.
        split: "train" or "validation".

    Raises:
        ValueError: no such folder, one that is not finished, or a file of another size.
    """

    at_random = False

    @checked
    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.settings = read_settings(self.folder)
        shards = self.settings.shards(split)
        self._names = [name for name, _ in shards]
        self._tables = dict[int, np.ndarray]()
        there = {entry.name for entry in os.scandir(self.folder)}
        sizes = {count: _size(self.settings.dtype, count) for count in {len(rows) for _, rows in shards}}
        self._refuse(
            [name for name, rows in shards if name not in there or not self._is_whole(name, sizes[len(rows)])]
        )

    def verify(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Read files and raise `ValueError` for those whose content is not what was written.

        Args:
            rank: of this process; each of several reads files of its own.
            num_ranks: processes.
        """
        self._refuse([name for name in self._names[rank::num_ranks] if not is_whole(self.folder / name)])

    def _is_whole(self, name: str, size: int) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == size and checksum_path(path).is_file()

    def _refuse(self, broken: list[str]) -> None:
        if broken:
            raise ValueError(
                f"{self.folder}: {len(broken)} of the {len(self._names)} files of the {self.split} split are "
                f"missing or damaged, the first of them {broken[0]}; run the same viar tokenize again, "
                "which makes those and no others"
            )

    def __len__(self) -> int:
        return self.settings.rows(self.split)

    def __getitems__(self, indices: Sequence[int]) -> TokenRows:
        """Tokens of all scales (B, L) int64 and labels (B,) int64."""
        size, rows = self.settings.shard_size, range(len(self))
        # Numbers below 0 count from the end of all rows, not of a file; beyond the rows is an `IndexError`.
        places = [divmod(rows[index], size) for index in indices]
        table = np.stack([self._table(number)[row] for number, row in places])
        tokens, labels = (torch.from_numpy(table[name].astype(np.int64)) for name in ("tokens", "label"))
        for what, values, count in (
            ("tokens", tokens, self.settings.codebook_size),
            ("labels", labels, self.settings.num_classes),
        ):
            if values.numel() and not (values.min() >= 0 and values.max() < count):
                raise ValueError(
                    f"{self.folder}: expected {what} of 0 to {count - 1}, got others; make them anew in "
                    "another folder with viar tokenize"
                )
        return tokens, labels

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files, of which a pickle would hold every number."""
        return {**self.__dict__, "_tables": {}}

    def _table(self, number: int) -> np.ndarray:
        """A file of the split."""
        if number not in self._tables:
            self._tables[number] = self._opened(number)
        return self._tables[number]

    def _opened(self, number: int) -> np.ndarray:
        name, size = self._names[number], self.settings.shard_size
        rows = range(len(self))[number * size : (number + 1) * size]
        header = _header(self.settings.dtype, len(rows))
        with (self.folder / name).open("rb") as file:
            if file.read(len(header)) != header:  # what a damaged one may tell is of no interest
                self._refuse([name])
        return np.memmap(self.folder / name, self.settings.dtype, "r", len(header), (len(rows),))

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise `ValueError` unless these are tokens of `tokenizer`."""
        found = self.settings
        flaws = [
            f"its {name} is {getattr(tokenizer.config, name)}, theirs {getattr(found, name)}"
            for name in ("sides", "codebook_size")
            if getattr(tokenizer.config, name) != getattr(found, name)
        ]
        own = fingerprint(tokenizer)
        if not flaws and own != found.tokenizer:
            flaws = [f"its fingerprint is {own}, theirs {found.tokenizer}"]
        if flaws:
            raise ValueError(
                f"{self.folder} holds tokens of another tokenizer ({'; '.join(flaws)}); give the one that "
                "made them, or run viar tokenize with this one into another folder"
            )


@checked
def is_shards(folder: str | Path) -> bool:
    """Whether a folder holds tokens, finished or not."""
    return (Path(folder) / SETTINGS).is_file()


def read_settings(folder: Path) -> ShardSettings:
    """Settings of the tokens in a folder.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder}: no {SETTINGS} there, so no tokens; make them with viar tokenize")
    try:
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')} where {FORMAT} is known")
        lists = ("sides", "images", "class_names", "augmentations")
        values: dict[str, Any] = {
            name: tuple(value) if name in lists else value for name, value in found.items()
        }
        return ShardSettings(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: unreadable ({error}); make the tokens anew in another folder") from error


def is_whole(path: Path) -> bool:
    """Whether a file of rows is there with the content that it was written with; reads all of it."""
    told = checksum_path(path)
    return path.is_file() and told.is_file() and told.read_bytes().strip() == file_digest(path).encode()


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file of rows is kept."""
    return path.with_suffix(".sha256")


def _size(dtype: np.dtype[np.void], num_rows: int) -> int:
    """Bytes of a file of so many rows."""
    return len(_header(dtype, num_rows)) + num_rows * dtype.itemsize


def _header(dtype: np.dtype[np.void], num_rows: int) -> bytes:
    """What stands before the rows, as `numpy.save` writes it."""
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": (num_rows,)}
    )
    return header.getvalue()

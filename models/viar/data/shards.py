"""Tokens of a data set on disk: written once by a tokenizer, trained on as often as one likes.

A folder holds `shards.json`, all that the tokens depend on, and for the training and the held-out images
files of a fixed number of rows: `train-00000.npy`, ..., `validation-00000.npy`, ... A row is the tokens of
all scales and the label; files are mapped into memory, so that a data set may be larger than that. Beside
each lies `NAME.sha256`, written last: a file without it is not whole, and is made again.

Shape letters: B batch, L tokens of all scales.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from ..files import replacing
from ..model.config import check_at_least
from ..pretrained import fingerprint
from ..seeds import LARGEST_SEED, seed_at
from ..tokenizer import Tokenizer
from .dataset import Batch, BatchedDataset, ImageData, TensorImages

SETTINGS = "shards.json"
FORMAT = 1  # to be raised with whatever changes the rows of given settings
SPLITS = ("train", "validation")

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
        crops: rows of each training image.
        seed: of the crops.
        shard_size: rows of a file; the last one may have fewer.
        batch_size: images encoded at a time: in another batch sums are rounded otherwise, and of two codes
            that are equally near another is taken.
        format: of the folder.
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


@dataclass(frozen=True)
class ShardReport:
    """What `write_shards` did.

    Attributes:
        rows: of the training split, and of the held-out one.
        made: files made by this call.
        found: files that were there.
    """

    rows: tuple[int, int]
    made: int
    found: int


def write_shards(
    tokenizer: Tokenizer,
    data: ImageData,
    folder: Path,
    *,
    origin: Mapping[str, Any],
    crops: int = 1,
    seed: int = 0,
    shard_size: int = 8192,
    batch_size: int = 64,
    console: Console | None = None,
) -> ShardReport:
    """Write the tokens of all images into a folder; goes on where an earlier call stopped.

    The files are the same bit for bit however often the work was interrupted, on one kind of machine with
    one number of threads. A crop depends on `seed`, its number and the image's alone.

    Args:
        tokenizer: in evaluation mode, on the device to work on.
        data: images; of a source that is cut at random every training image gives `crops` rows.
        folder: new, empty, or begun with the same settings.
        origin: where the images come from, in plain values; compared where the folder was begun before.
        crops: rows of each training image, at least 1.
        seed: of the crops.
        shard_size: rows of a file.
        batch_size: images encoded at a time.
        console: where the progress is shown.

    Raises:
        ValueError: an argument out of range; several crops of images that are not cut; the folder holds
            something else, or tokens made with other settings, which the message lists.
    """
    check_at_least("tokenize", 1, crops=crops, shard_size=shard_size, batch_size=batch_size)
    check_at_least("tokenize", 0, seed=seed)
    if seed > LARGEST_SEED:
        raise ValueError(f"tokenize: seed must be at most {LARGEST_SEED}, got {seed}")
    if crops > 1 and isinstance(data.train, TensorImages):
        raise ValueError(
            f"crops: expected 1 for images that are held in memory and not cut at random, got {crops}; use "
            "augment for changed versions of them"
        )
    settings = ShardSettings(
        tokenizer=fingerprint(tokenizer),
        sides=tokenizer.config.sides,
        codebook_size=tokenizer.config.codebook_size,
        num_classes=data.num_classes,
        origin=origin,
        images=(len(data.train), len(data.validation)),
        crops=crops,
        seed=seed,
        shard_size=shard_size,
        batch_size=batch_size,
    )
    _enter(folder, settings)
    names = [(split, name, rows) for split in SPLITS for name, rows in settings.shards(split)]
    missing = [shard for shard in names if not is_whole(folder / shard[1])]
    images = dict(zip(SPLITS, (data.train, data.validation), strict=True))
    for split, name, rows in track(missing, "tokenize", console=console, disable=not missing):
        table = np.empty(len(rows), settings.dtype)
        _fill(table, tokenizer, images[split], rows, settings)
        _write(folder / name, table)
    return ShardReport(
        (settings.rows("train"), settings.rows("validation")), len(missing), len(names) - len(missing)
    )


class TokenShards(Dataset[TokenRows]):
    """Rows of tokens in a folder of `write_shards`, served a batch at a time.

    Args:
        folder: with `shards.json`.
        split: "train" or "validation".

    Raises:
        ValueError: no such folder, one that is not finished, or a damaged file.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.settings = read_settings(self.folder)
        self._paths = [self.folder / name for name, _ in self.settings.shards(split)]
        broken = [path.name for path in self._paths if not is_whole(path)]
        if broken:
            raise ValueError(
                f"{self.folder}: {len(broken)} of the {len(self._paths)} files of the {split} split are "
                f"missing or damaged, the first of them {broken[0]}; run the same viar tokenize again, which "
                "makes those and no others"
            )

    def __len__(self) -> int:
        return self.settings.rows(self.split)

    def __getitems__(self, indices: Sequence[int]) -> TokenRows:
        """Tokens of all scales (B, L) int64 and labels (B,) int64."""
        size = self.settings.shard_size
        table = np.stack([self._tables[index // size][index % size] for index in indices])
        tokens, labels = (torch.from_numpy(table[name].astype(np.int64)) for name in ("tokens", "label"))
        return tokens, labels

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files, of which a pickle would hold every number."""
        return {name: value for name, value in self.__dict__.items() if name != "_tables"}

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r") for path in self._paths]

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
        found = json.loads(path.read_text())
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')} where {FORMAT} is known")
        return ShardSettings(**{**found, "sides": tuple(found["sides"]), "images": tuple(found["images"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: unreadable ({error}); make the tokens anew in another folder") from error


def is_whole(path: Path) -> bool:
    """Whether a file of rows is there with the content that it was written with."""
    told = _checksum_of(path)
    return path.is_file() and told.is_file() and told.read_text().strip() == _checksum(path)


def _enter(folder: Path, settings: ShardSettings) -> None:
    """Begin a folder, or go on in one of the same settings."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder for the tokens, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(asdict(settings)))
    if is_shards(folder):
        found = json.loads(json.dumps(asdict(read_settings(folder))))
        others = [name for name in wanted if wanted[name] != found[name]]
        if others:
            listed = "; ".join(f"{name}: {found[name]} there, {wanted[name]} now" for name in others)
            raise ValueError(
                f"{folder} holds tokens made with other settings; give another folder, or these settings as "
                f"they were: {listed}"
            )
    elif any(path.suffix != ".partial" for path in folder.iterdir()):
        raise ValueError(f"{folder}: holds something else than tokens; give a new or an empty folder")
    with replacing(folder / SETTINGS) as file:
        file.write(json.dumps(wanted, indent=1).encode())


def _fill(
    table: np.ndarray,
    tokenizer: Tokenizer,
    images: BatchedDataset[Batch],
    rows: range,
    settings: ShardSettings,
) -> None:
    """Tokens and labels of these rows. Batches begin with the file, whichever files are there already."""
    device = tokenizer.quantizer.codebook.weight.device
    for start in range(0, len(rows), settings.batch_size):
        chunk = rows[start : start + settings.batch_size]
        parts = list(_cut(images, chunk, settings.seed))
        batch, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        with torch.autocast(device.type, enabled=False):
            tokens = torch.cat(tokenizer.encode(batch.to(device)), 1)
        table["tokens"][start : start + len(chunk)] = tokens.cpu().numpy()
        table["label"][start : start + len(chunk)] = labels.numpy()


def _cut(images: BatchedDataset[Batch], rows: range, seed: int) -> Iterator[Batch]:
    """The image of each row, cut where the row's own seed says. All images come once, then all again."""
    with torch.random.fork_rng(devices=[]):
        for row in rows:
            torch.default_generator.manual_seed(seed_at(seed, row))
            yield images.__getitems__([row % len(images)])


def _write(path: Path, table: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, table)
    with replacing(_checksum_of(path)) as file:
        file.write(_checksum(path).encode())


def _checksum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

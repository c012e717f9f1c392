"""Data sets of the Hugging Face hub, through the package `datasets`, which is asked for when one is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .dataset import Batch
from .decoding import decode_bytes, decode_picture, shown
from .pictures import cut_square
from .report import Skipped
from .splits import PARTS

Rows = list[tuple[int, int]]  # number of a row in its split, and its label


class HubImages(Dataset[Batch]):
    """Pictures of a split of a data set, read and cut as those of `ImageFolder` are.

    Args:
        table: the split, whose column `column` holds pictures as they are stored, not decoded.
        column: name of that column.
        rows: number and label of each row that is served.
        name: of data set and split, for errors.
        image_side: pixels a side of what is served.
        train: cut at random, by PyTorch's own generator, which `rows_of` seeds; else from the centre.
    """

    def __init__(
        self, table: Any, column: str, rows: Rows, name: str, image_side: int, *, train: bool
    ) -> None:
        self.table, self.column, self.rows, self.name = table, column, rows, name
        self.image_side, self.at_random = image_side, train
        self.augmentations = ("crop",) if train else ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch."""
        chosen = [self.rows[index] for index in indices]
        images = [self._image(row) for row, _ in chosen]
        return torch.stack(images), torch.tensor([label for _, label in chosen])

    def _image(self, row: int) -> torch.Tensor:
        stored = self.table[row][self.column]
        name = f"{self.name}, row {row}"
        if stored is None:
            raise ValueError(f"{name}: has no picture; leave the row out of the data set")
        if stored["bytes"] is None:
            picture = decode_picture(Path(stored["path"]))
        else:
            picture = decode_bytes(stored["bytes"], name)
        return cut_square(picture, self.image_side, at_random=self.at_random)


@dataclass(frozen=True)
class HubSplit:
    """A data set as it is found: a table and the labels of its rows for each part.

    Attributes:
        train: to learn from.
        validation: what the data set says is held out; None where it does not say.
        tables: of train and validation, by those names.
        column: of the pictures.
        class_names: of label 0, 1, ...
        skipped: rows that give no sample, and why.
        notes: what else one should know.
    """

    train: Rows
    validation: Rows | None
    tables: Mapping[str, Any]
    column: str
    class_names: tuple[str, ...]
    skipped: list[Skipped]
    notes: list[str]


def split_hub(name: str) -> HubSplit:
    """Find pictures and labels of a data set.

    Args:
        name: as on the hub, also with a configuration, and a commit, tag or branch, "NAME:CONFIG@REVISION";
            or a folder that `datasets` reads.

    Raises:
        ValueError: `datasets` is not installed, the data set cannot be had, or which of its columns are
            pictures and labels cannot be told.
    """
    found, notes = _load(name), list[str]()
    keys = dict[str, str]()  # of each part
    for key in found:
        part = PARTS.get(key.lower())
        if part and keys.setdefault(part, key) != key:
            raise _refused(name, f"the splits {keys[part]} and {key} are both {part}; leave one")
    parts = {part: found[key] for part, key in keys.items()}
    if "train" not in parts:
        raise _refused(name, f"no split called train among {', '.join(found)}")
    unused = [key for key in found if key.lower() not in PARTS]
    notes += [f"the split {key} is not used" for key in unused]
    column = _picture_column(name, parts["train"].features)
    label_column = _label_column(name, parts["train"].features, notes)
    class_names, labels = _labels(name, parts, label_column)
    skipped = list[Skipped]()
    rows = {part: _with_label(part, labels[part], skipped) for part in parts}
    held = next((part for part in ("val", "test") if rows.get(part)), None)
    if held is not None:
        notes.append(f"the split {keys[held]} is held out")
    if held == "val" and "test" in parts:
        notes.append(f"the split {keys['test']} is not used beside it")
        skipped = [one for one in skipped if one.path.parts[0] != "test"]
    tables = {"train": parts["train"], "validation": parts.get(held or "")}
    return HubSplit(
        rows["train"],
        None if held is None else rows[held],
        {part: _undecoded(table, column) for part, table in tables.items() if table is not None},
        column,
        class_names,
        skipped,
        notes,
    )


def _load(name: str) -> dict[str, Any]:
    """The splits of a data set by their names."""
    try:
        import datasets
    except ImportError as error:
        raise _refused(name, "the package datasets is needed; pip install 'deqlib[hub]'") from error
    wanted, revision = _revision_of(name)
    path, _, config = wanted.partition(":")
    try:
        if any((Path(path) / kept).is_file() for kept in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config or None, revision=revision)
    except Exception as error:  # of networks, of the hub, of files: the package raises dozens of kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refused(
            name,
            f"cannot be had ({reason}); without a network, only what was loaded before and folders can be",
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _revision_of(name: str) -> tuple[str, str | None]:
    """The name without its revision, and the revision; none of a folder, in whose name @ is a letter."""
    if Path(name.partition(":")[0]).exists():
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def _refused(name: str, reason: str) -> ValueError:
    return ValueError(f"source: hub:{shown(name)}: {reason}")


def _picture_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    columns = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        raise _refused(
            name,
            f"expected one column of pictures among {', '.join(features)}, found "
            f"{', '.join(columns) or 'none'}",
        )
    return columns[0]


def _label_column(name: str, features: Mapping[str, Any], notes: list[str]) -> str:
    import datasets

    columns = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if "label" in features:
        return "label"
    if not columns:
        raise _refused(name, f"no column of class labels, and none called label, among {', '.join(features)}")
    if others := columns[1:]:
        notes.append(f"labels are those of {columns[0]}; not used: {', '.join(others)}")
    return columns[0]


def _labels(
    name: str, parts: Mapping[str, Any], column: str
) -> tuple[tuple[str, ...], dict[str, list[int | None]]]:
    """Names of the classes, and the label of every row of every part, None where there is none."""
    values = {part: list(table[column]) if column in table.features else [] for part, table in parts.items()}
    names = getattr(parts["train"].features[column], "names", None)
    if names is not None:
        return tuple(names), {
            part: [None if one is None or one < 0 else int(one) for one in some]
            for part, some in values.items()
        }
    classes = sorted({one for one in values["train"] if one is not None})
    if not all(isinstance(one, str | int) for one in classes):
        raise _refused(name, f"column {column}: expected classes as numbers or names, found {classes[0]!r}")
    number = {value: label for label, value in enumerate(classes)}
    strange = [one for some in values.values() for one in some if one is not None and one not in number]
    if strange:
        raise _refused(name, f"the class {strange[0]!r} has no pictures in the split train")
    return tuple(map(str, classes)), {
        part: [None if one is None else number[one] for one in some] for part, some in values.items()
    }


def _with_label(part: str, labels: Sequence[int | None], skipped: list[Skipped]) -> Rows:
    rows = [(row, label) for row, label in enumerate(labels) if label is not None]
    skipped += [
        Skipped(Path(part, str(row)), "without a label") for row, one in enumerate(labels) if one is None
    ]
    return rows


def _undecoded(table: Any, column: str) -> Any:
    """The column of pictures alone, as they are stored: they are decoded as all others are."""
    import datasets

    return table.select_columns(column).cast_column(column, datasets.Image(decode=False))

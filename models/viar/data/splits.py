"""What the sub-folders of a folder of pictures are: classes, or train/, val/ and test/ that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .decoding import shown
from .report import Skipped
from .scan import Scan, most_common_reasons, name_key, scan

# What folders and splits may be called.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_DIRECTLY = "pictures lie directly in"
_INTO_SUB_FOLDERS = "put those of each class into a sub-folder, all into one if there are no classes"
_NO_CLASS = "in no class folder"


@dataclass(frozen=True)
class Split:
    """Pictures with labels, and what else was found.

    Attributes:
        train: to learn from, class by class.
        validation: those held out; None where the folder does not say which.
        class_names: of label 0, 1, ...
        skipped: what gives no sample, and why.
        notes: what else one should know.
    """

    train: list[tuple[Path, int]]
    validation: list[tuple[Path, int]] | None
    class_names: tuple[str, ...]
    skipped: list[Skipped]
    notes: list[str]


def split_folder(root: Path) -> Split:
    """The pictures below `root` with their labels.

    A class is a sub-folder of `root`, with all that is below it. Where the sub-folders are train/ and val/
    (also training/, valid/, validation/), classes are the sub-folders of these, by the same names; test/
    takes the place of a val/ that is not there. Classes are numbered by name; a folder without pictures is
    none.

    Raises:
        ValueError: `root` is no folder, has no pictures in sub-folders, or its parts do not fit together.
        PermissionError: `root` must not be read.
    """
    found = scan(root)
    if not any(len(path.parts) > 1 for path in found.pictures):
        raise ValueError(f"{shown(root)}: {_nothing(found)}")
    notes = list[str]()
    if found.animated:
        notes.append(f"{found.animated:,} with several frames or pages: the first of each is used")
    parts = _parts(found, notes)
    skipped = found.skipped + _empty(found, parts)
    if parts is None:
        classes = _classes(found, Path(), skipped)
        train, held = classes, None
    else:
        skipped += [Skipped(path, _NO_CLASS) for path in found.pictures if len(path.parts) == 1]
        train, held = _with_parts(found, parts, skipped, notes)
    names = sorted(train)
    notes += _alike(names) + _only(root, Path((parts or {}).get("train", "")), train)
    return Split(
        _labelled(root, train, names),
        None if held is None else _labelled(root, held, names),
        tuple(names),
        sorted(skipped, key=lambda one: one.path.parts),
        notes,
    )


def _nothing(found: Scan) -> str:
    if found.pictures:
        return f"{_DIRECTLY} it ({len(found.pictures):,}); {_INTO_SUB_FOLDERS}"
    return f"no picture in any sub-folder; found {most_common_reasons(found.skipped)}"


def _parts(found: Scan, notes: list[str]) -> dict[str, str] | None:
    """Name of the folder that is each part; None where the sub-folders are classes."""
    root = shown(found.root)
    filled = sorted({path.parts[0] for path in found.pictures if len(path.parts) > 1})
    others = [name for name in filled if name.lower() not in PARTS]
    named = [(PARTS[name.lower()], name) for name in filled if name.lower() in PARTS]
    parts = dict(named)
    if not named:
        return None
    nested = "train" in parts and _has_classes(found, parts["train"])
    if others and not (nested and len(parts) > 1):
        notes += [f"{name}/ is taken as a class, for it lies beside {others[0]}/" for _, name in named]
        return None
    if others:
        raise ValueError(
            f"{root}: {shown(others[0])}/ lies beside {shown(parts['train'])}/ and is none of train/, val/ "
            "and test/; move it away, or give the folder in which the classes lie"
        )
    for part, name in named:
        if parts[part] != name:
            raise ValueError(f"{root}: {shown(name)}/ and {shown(parts[part])}/ are both {part}/; leave one")
    if "train" not in parts:
        raise ValueError(
            f"{root}: no pictures in train/, but in {shown(named[0][1])}/; "
            "give the folder in which the classes lie"
        )
    if not nested:
        raise ValueError(f"{root}: {_DIRECTLY} {shown(parts['train'])}/; {_INTO_SUB_FOLDERS}")
    return parts


def _with_parts(
    found: Scan, parts: dict[str, str], skipped: list[Skipped], notes: list[str]
) -> tuple[dict[str, list[Path]], dict[str, list[Path]] | None]:
    """Pictures of each class in train/, and in what is held out."""
    root = shown(found.root)
    train = _classes(found, Path(parts["train"]), skipped)
    if "val" in parts and "test" in parts:
        reason = f"in {parts['test']}/, which is not used beside {parts['val']}/"
        skipped += [Skipped(path, reason) for path in found.pictures if path.parts[0] == parts["test"]]
    name = parts.get("val", parts.get("test"))
    if name is None:
        unfilled = [folder.name for folder in found.folders if PARTS.get(str(folder).lower()) == "val"]
        notes += [f"no picture in {folder}/: some of {parts['train']}/ are held out" for folder in unfilled]
        return train, None
    if not _has_classes(found, name) and "val" in parts:
        raise ValueError(
            f"{root}: {_DIRECTLY} {shown(name)}/; put them into sub-folders named like those of "
            f"{shown(parts['train'])}/, or give {shown(found.root / parts['train'])}"
        )
    held = _classes(found, Path(name), skipped)
    if not held:
        notes.append(f"{name}/ has no class folders: some of {parts['train']}/ are held out")
        return train, None
    if strange := sorted(held.keys() - train.keys()):
        near = {key.casefold(): key for key in train}.get(strange[0].casefold())
        hint = f"; it has {shown(near)!r}" if near else ""
        raise ValueError(
            f"{root}: {shown(name)}/ has the class {shown(strange[0])!r}, which has no pictures in "
            f"{shown(parts['train'])}/{hint}; the classes of both must have the same names"
        )
    if missing := sorted(train.keys() - held.keys()):
        notes.append(f"{name}/ has no pictures of {len(missing):,} classes: {', '.join(missing[:5])}")
    notes.append(f"{name}/ is held out")
    return train, held


def _has_classes(found: Scan, part: str) -> bool:
    return any(path.parts[0] == part and len(path.parts) > 2 for path in found.pictures)


def _classes(found: Scan, below: Path, skipped: list[Skipped]) -> dict[str, list[Path]]:
    """Pictures of each class among the sub-folders of `below`; those directly in it are skipped."""
    depth = len(below.parts)
    pictures, spelt = defaultdict[str, list[Path]](list), dict[str, str]()
    for path in found.pictures:
        if path.parts[:depth] != below.parts:
            continue
        if len(path.parts) == depth + 1:
            skipped.append(Skipped(path, _NO_CLASS))
            continue
        folder = path.parts[depth]
        name = name_key(folder)
        if spelt.setdefault(name, folder) != folder:
            raise ValueError(
                f"{shown(found.root / below)}: two folders are called {shown(name)!r}; rename one"
            )
        pictures[name].append(path)
    return dict(pictures)


def _empty(found: Scan, parts: dict[str, str] | None) -> list[Skipped]:
    """Folders that would be classes or parts if they had pictures in them."""
    filled = {parent for path in found.pictures for parent in path.parents}
    tops = [Path(), *(Path(name) for name in (parts or {}).values())]
    return [
        Skipped(folder, "without a picture in it, so no class")
        for folder in found.folders
        if folder not in filled and folder.parent in tops
    ]


def _alike(names: Iterable[str]) -> list[str]:
    """A note for classes that a file system may take for one."""
    by_fold = defaultdict[str, list[str]](list)
    for name in names:
        by_fold[name.casefold()].append(name)
    return [
        f"{', '.join(alike)} differ in case only and are {len(alike)} classes"
        for alike in by_fold.values()
        if len(alike) > 1
    ]


def _only(root: Path, below: Path, classes: dict[str, list[Path]]) -> list[str]:
    """A note where all is one class with folders in it: often a folder too high was given."""
    if len(classes) > 1:
        return []
    ((name, pictures),) = classes.items()
    depth = len(below.parts) + 1
    inner = sorted({path.parts[depth] for path in pictures if len(path.parts) > depth + 1})
    if len(inner) < 2:
        return []
    more = " and so on" if len(inner) > 3 else ""
    return [
        f"{name}/ is the only class, with the folders {', '.join(inner[:3])}{more} in it; give "
        f"{root / below / name} if these are the classes, or the parts"
    ]


def _labelled(root: Path, classes: dict[str, list[Path]], names: list[str]) -> list[tuple[Path, int]]:
    return [(root / path, label) for label, name in enumerate(names) for path in classes.get(name, ())]

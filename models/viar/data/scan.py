"""The pictures below a folder, and why the other files there are none."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .decoding import ENDINGS, has_frames, open_picture, shown
from .report import Skipped

# What programs and systems leave behind, beside names that begin with a dot.
_LEFT_BEHIND = {
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


@dataclass
class Scan:
    """What is below a folder; every path is relative to it and sorted by the names of its parts.

    Attributes:
        root: the folder.
        pictures: files whose headers say that they are pictures of a kind that is read.
        folders: all that are not hidden.
        skipped: what is no picture, or cannot be read.
        animated: how many of `pictures` have several frames or pages.
    """

    root: Path
    pictures: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    animated: int = 0


def name_key(name: str) -> str:
    """The name as it is sorted and matched: file systems spell accents in two ways."""
    return unicodedata.normalize("NFC", name)


def path_key(path: Path) -> tuple[str, ...]:
    """What paths are sorted by, alike on all file systems."""
    return tuple(map(name_key, path.parts))


def scan(root: Path) -> Scan:
    """Look at every file below `root` once, at the header of those that are called pictures.

    Links are followed, but not to a folder that they lie in.

    Raises:
        ValueError: `root` is no folder.
        PermissionError: `root` must not be read.
    """
    found = Scan(root)
    waiting = [(Path(), frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(root / folder)
            names = os.listdir(root / folder)
        except OSError as error:
            if folder == Path():
                raise _unreadable(root, error) from error
            found.skipped.append(Skipped(folder, f"cannot be opened ({error.strerror})"))
            continue
        identity = status.st_dev, status.st_ino
        if identity in above:
            found.skipped.append(Skipped(folder, "a link to a folder that it lies in"))
            continue
        found.folders.append(folder)
        waiting += [(path, above | {identity}) for name in names if _sorted_out(found, path := folder / name)]
    found.folders.sort(key=path_key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own do not name the file, and the report does
        found.pictures = [path for path in sorted(found.pictures, key=path_key) if _is_whole(found, path)]
    found.skipped.sort(key=lambda skipped: path_key(skipped.path))
    return found


def _sorted_out(found: Scan, path: Path) -> bool:
    """Whether `path` is a folder to look into; if not it is put where it belongs."""
    ending = path.suffix.lower()
    if path.name.startswith(".") or path.name.lower() in _LEFT_BEHIND:
        found.skipped.append(Skipped(path, "hidden or left behind by a program"))
    elif os.path.isdir(found.root / path):
        return True
    elif ending in ENDINGS:
        found.pictures.append(path)
    else:
        kind = f"with the ending {ending}" if ending else "without an ending"
        found.skipped.append(Skipped(path, f"{kind}, which is not read"))
    return False


def _is_whole(found: Scan, path: Path) -> bool:
    """Whether the header of a file says that it is a picture that is read; the rest is not looked at."""
    full = found.root / path
    try:
        with open_picture(full) as image:
            found.animated += has_frames(image, full)
    except (ValueError, OSError) as error:
        found.skipped.append(Skipped(path, str(error).removeprefix(f"{shown(full)}: ")))
        return False
    return True


def _unreadable(folder: Path, error: OSError) -> OSError | ValueError:
    if isinstance(error, PermissionError):
        return PermissionError(f"{shown(folder)}: {error.strerror}")
    return ValueError(f"{shown(folder)}: {error.strerror}")


def most_common_reasons(skipped: list[Skipped], most: int = 3) -> str:
    """What most of the files are that give no sample, in a few words for an error."""
    counts = Counter(one.reason for one in skipped).most_common(most)
    return "; ".join(f"{count:,} {shown(reason)}" for reason, count in counts) or "no files"

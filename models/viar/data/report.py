"""What was found in folders and data sets of pictures, for people to read before hours are spent on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, chop_cells

from .decoding import shown

WIDTH = 100  # columns of the report
_NAMED = 20  # classes that are listed one by one
_EXAMPLES = 3  # names given of each reason
_REASONS = 12  # reasons given


@dataclass(frozen=True)
class Skipped:
    """A file or folder that gives no sample, and why.

    Attributes:
        path: below the root.
        reason: in words, without the path.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class FolderReport:
    """What a folder of pictures holds; `str` of it is a text of at most 100 columns.

    Attributes:
        root: the folder; of other sources what they are called.
        class_names: of label 0, 1, ...
        train_counts: pictures to learn from, of each class.
        validation_counts: pictures held out, of each class.
        skipped: every file and folder below the root that gives no sample, with the reason.
        notes: what else one should know, a sentence each.
    """

    root: Path
    class_names: tuple[str, ...]
    train_counts: tuple[int, ...]
    validation_counts: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        root: Path,
        class_names: tuple[str, ...],
        train: Iterable[tuple[object, int]],
        validation: Iterable[tuple[object, int]],
        skipped: Iterable[Skipped],
        notes: Iterable[str] = (),
    ) -> FolderReport:
        """A report of `train` and `validation`: pictures with their labels, whatever a picture is."""
        counts, held = (Counter(label for _, label in part) for part in (train, validation))
        labels = range(len(class_names))
        return cls(
            root,
            class_names,
            tuple(counts[label] for label in labels),
            tuple(held[label] for label in labels),
            tuple(skipped),
            tuple(notes),
        )

    def __str__(self) -> str:
        train, validation = sum(self.train_counts), sum(self.validation_counts)
        lines = [
            f"{shown(self.root)}: {_number(len(self.class_names), 'class', 'classes')}, "
            f"{_number(train, 'picture')} to learn from, {validation:,} held out",
            f"classes: {self._classes()}",
            *(f"note: {shown(note)}" for note in self.notes),
            *describe_skipped(self.skipped),
        ]
        return "\n".join(part for line in lines for part in _wrapped(line))

    def _classes(self) -> str:
        counts = list(zip(self.class_names, self.train_counts, self.validation_counts, strict=True))
        if len(counts) <= _NAMED:
            return ", ".join(f"{shown(name)} {train} + {held}" for name, train, held in counts)
        fewest, most = min(counts, key=lambda c: c[1]), max(counts, key=lambda c: c[1])
        return (
            f"{shown(counts[0][0])} to {shown(counts[-1][0])}; to learn from {fewest[1]:,} "
            f"({shown(fewest[0])}) to {most[1]:,} ({shown(most[0])}) each"
        )


def describe_skipped(skipped: Iterable[Skipped]) -> list[str]:
    """Lines that count what was left out by reason, with some names of each."""
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for one in skipped:
        by_reason[one.reason].append(one.path)
    if not by_reason:
        return []
    lines = [f"left out: {sum(map(len, by_reason.values())):,}"]
    # Most first: of equal counts in the order in which they were found.
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    for reason, paths in ordered[:_REASONS]:
        names = ", ".join(shown(path) for path in paths[:_EXAMPLES])
        more = f" and {len(paths) - _EXAMPLES:,} more" if len(paths) > _EXAMPLES else ""
        lines.append(f"  {len(paths):,} {shown(reason)}: {names}{more}")
    if others := ordered[_REASONS:]:
        lines.append(
            f"  {sum(len(paths) for _, paths in others):,} for {_number(len(others), 'other reason')}"
        )
    return lines


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _wrapped(line: str) -> list[str]:
    """A line cut between words where it can be, so that each part has at most `WIDTH` columns."""
    indent = line[: len(line) - len(line.lstrip())]
    rows, row = list[str](), indent
    for word in line.split():
        for index, piece in enumerate(chop_cells(word, WIDTH - len(indent) - 2)):
            if row.strip() and (index or cell_len(f"{row} {piece}") > WIDTH):
                rows.append(row)
                row = indent + "  "
            row += f" {piece}" if row.strip() else piece
    return [*rows, row]

"""Files of figures: written point by point, read with a check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from viar.checksums import CHECKSUM, checksum_of, read_json
from viar.files import replacing

from .case import Bar, Row, Settings
from .environment import hardware

FORMAT = 1
COMMITTED = Path(__file__).parent / "results"
SCHEMA_FILE = Path(__file__).parent / "schema.json"


@dataclass
class Results:
    """Figures of one suite, as they are in a file.

    Attributes:
        suite: its name.
        options: of the run: device, rounds, quick.
        environments: in which points were measured; a resumed run may add one.
        points: by case, each with its settings, the index of its environment, seconds and rows.
        bars: of the suite, judged over all points there are.
    """

    suite: str
    options: dict[str, Any]
    environments: list[dict[str, Any]]
    points: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bars: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, case: str) -> list[Row]:
        """All rows of a case, each with the settings of its point."""
        return [{**point["settings"], **row} for point in self.points.get(case, []) for row in point["rows"]]

    def has(self, case: str, settings: Settings) -> bool:
        """Whether the point was measured."""
        return any(point["settings"] == settings for point in self.points.get(case, []))

    def add(self, case: str, settings: Settings, seconds: float, rows: Iterable[Row]) -> None:
        """A point measured in the last environment."""
        self.points.setdefault(case, []).append(
            {
                "settings": settings,
                "environment": len(self.environments) - 1,
                "seconds": seconds,
                "rows": list(rows),
            }
        )

    def arrange(self, case: str, grid: Sequence[Settings]) -> None:
        """Points of a case in the order of its grid, wherever a resumed run added them; others last."""

        def rank(point: dict[str, Any]) -> int:
            return grid.index(point["settings"]) if point["settings"] in grid else len(grid)

        if case in self.points:
            self.points[case].sort(key=rank)

    def judge(self, bars: Iterable[Bar]) -> None:
        """Replace the bars."""
        self.bars = [bar.record() for bar in bars]

    @property
    def file_name(self) -> str:
        """SUITE_HARDWARE_DATE.json."""
        first = self.environments[0]
        quick = "_quick" * bool(self.options["quick"])
        return f"{self.suite}{quick}_{hardware(first)}_{first['date'][:10]}.json"

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        record = {
            "format": FORMAT,
            "suite": self.suite,
            "options": self.options,
            "environments": self.environments,
            "cases": self.points,
            "bars": self.bars,
        }
        text = _json({**record, CHECKSUM: checksum_of(record)}) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file; its form is checked where jsonschema is installed, else its format alone.

        Raises:
            ValueError: it is not one of ours, or of another format, or was changed since it was written.
        """
        try:
            record = read_json(path)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged or changed: {error}") from None
        if (fault := _fault(record)) is not None:
            told = f"no figures of `python -m benchmarks` in format {FORMAT}"
            raise ValueError(f"{path}: {told}: {fault}")
        return cls(
            record["suite"], record["options"], record["environments"], record["cases"], record["bars"]
        )


def _fault(record: Any) -> str | None:
    """Where a record breaks the schema; None if it does not."""
    try:
        import jsonschema
    except ModuleNotFoundError:  # a machine lent for minutes may lack it, or what it needs
        return None if isinstance(record, dict) and record.get("format") == FORMAT else "at format"

    try:
        jsonschema.validate(record, json.loads(SCHEMA_FILE.read_text()))
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the whole"
        return f"at {where}: {error.message}"
    return None


def _json(value: Any, depth: int = 0) -> str:
    """JSON with a line for each row, bar and environment: short, and fit to be compared line by line."""
    if depth == 5 or not value or not isinstance(value, dict | list):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        if not any(isinstance(item, dict | list) for item in value.values()):
            return json.dumps(value, allow_nan=False)
        items = [f"{json.dumps(name)}: {_json(item, depth + 1)}" for name, item in value.items()]
        opening, closing = "{}"
    else:
        items = [_json(item, depth + 1) for item in value]
        opening, closing = "[]"
    indent = "\n" + " " * (depth + 1)
    return opening + indent + f",{indent}".join(items) + "\n" + " " * depth + closing


def committed(suite: str, *, gpu: bool = False) -> list[tuple[Path, Results]]:
    """Committed figures of a suite, on a CPU or on a GPU, the newest first.

    A later file need not hold every case: those that it lacks are shown from the one before.

    Raises:
        ValueError: a file there was measured with --quick.
    """
    found = []
    for path in COMMITTED.glob(f"{suite}_*.json"):
        results = Results.load(path)
        if results.options["quick"]:
            told = "was measured with --quick and is never shown: remove it from"
            raise ValueError(f"{path.name} {told} {path.parent.name}/")
        if results.suite == suite and bool(results.environments[0]["gpu"]) == gpu:
            found.append((results.environments[0]["date"], path, results))
    return [(path, results) for _, path, results in sorted(found, key=itemgetter(0), reverse=True)]


def newest_of(files: Iterable[tuple[Path, Results]], case: str) -> tuple[Path, Results] | None:
    """The first of the files that holds figures of a case; None if none does."""
    return next(((path, results) for path, results in files if results.points.get(case)), None)


def newest_bars(files: Iterable[tuple[Path, Results]]) -> list[dict[str, Any]]:
    """Each bar of the files by its name, from the first file that measured it."""
    bars: dict[str, dict[str, Any]] = {}
    for _, results in files:
        for bar in results.bars:
            if bars.get(bar["name"], {}).get("value") is None:
                bars[bar["name"]] = bar
    return list(bars.values())


def unused(path: Path) -> Path:
    """The path, with a number behind its stem if the file exists: nothing is overwritten."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return candidate

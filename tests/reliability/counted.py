"""What the tests of reliability counted, kept as data, and shown in docs/reliability.md.

    python tests/reliability/counted.py

writes the tables of the page anew from `tests/reliability/record.json`, which `make reliability` renews.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.json")
PAGE = ROOT / "docs" / "reliability.md"

# What a test may count, by the table that shows it: names, and what stands above them.
TABLES: dict[str, dict[str, str]] = {
    "faults": {"runs": "runs", "lost": "data lost", "wrong": "wrong results", "unclear": "unclear errors"},
    "inputs": {
        "inputs": "inputs",
        "taken": "taken",
        "refused": "refused with a clear error",
        "undocumented": "other errors",
        "hung": "hung",
    },
    "load": {
        "requests": "requests",
        "errors": "errors",
        "p50": "median, ms",
        "p95": "95 %, ms",
        "p99": "99 %, ms",
        "growth": "memory, from the first to the last third",
    },
    "ends": {"times": "times", "slowest": "longest, s"},
    "memory": {"times": "times", "growth": "memory, from the first to the last third"},
    "same": {"runs": "runs", "same": "same bits", "different": "different bits"},
}
# Figures of which none but this may be counted, in any row.
MUST_BE_ZERO = ("lost", "wrong", "unclear", "undocumented", "hung", "errors")
HEADINGS = {
    "faults": "fault",
    "inputs": "given",
    "load": "load",
    "ends": "SIGTERM to",
    "memory": "work",
    "same": "settings",
}
OPEN = "*Not counted yet: `make reliability` does it.*"
_BLOCK = re.compile(r"(<!-- counted: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """What one test counted of one thing.

    Attributes:
        table: one of `TABLES`.
        what: was done or given, in words; once a table.
        figures: by the names of the table's columns.
        test: its id.
    """

    table: str
    what: str
    figures: dict[str, int | float | str]
    test: str = ""

    def __post_init__(self) -> None:
        expected = set(TABLES[self.table])
        if set(self.figures) != expected:
            raise ValueError(f"{self.what}: expected {sorted(expected)}, got {sorted(self.figures)}")


def read(path: Path = RECORD) -> tuple[dict[str, Any], list[Row]]:
    """Where it was counted, and the rows."""
    if not path.exists():
        return {}, []
    held = json.loads(path.read_text())
    return held["where"], [Row(**row) for row in held["rows"]]


def write(rows: list[Row], where: dict[str, Any], path: Path = RECORD) -> None:
    """Put rows into a record; those that it has of the same tests are replaced, others stay."""
    told = {row.test for row in rows}
    kept = [row for row in read(path)[1] if row.test not in told] + rows
    order = list(TABLES)
    kept.sort(key=lambda row: (order.index(row.table), row.test, row.what))
    path.write_text(json.dumps({"where": where, "rows": [asdict(row) for row in kept]}, indent=1) + "\n")


def written(text: str, rows: list[Row]) -> str:
    """The page with its tables written anew; of one without rows it says so."""

    def block(match: re.Match[str]) -> str:
        head, table, end = match.groups()
        if table == "promises":
            return f"{head}\n{_promises()}\n\n{end}"
        found = [row for row in rows if row.table == table]
        if not found:
            return f"{head}\n{OPEN}\n\n{end}"
        return f"{head}\n{_table(table, found)}\n\n{end}"

    return _BLOCK.sub(block, text)


def promised() -> list[str]:
    """Names of the promises of SECURITY.md, which lists them as `- **Name.** text`."""
    return re.findall(r"^- \*\*([^*]+)\.\*\*", (ROOT / "SECURITY.md").read_text(), re.M)


def kept_by() -> dict[str, list[str]]:
    """Tests by the promise that they keep, as `@pytest.mark.promise("Name")` above them says."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "mark.promise(" in text else ():
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                        (name,) = mark.args
                        told = f"{path.relative_to(ROOT)}::{node.name}"
                        found.setdefault(ast.literal_eval(name), []).append(told)
    return found


def _promises() -> str:
    kept = kept_by()
    lines = ["| promise | kept by |", "| --- | --- |"]
    lines += [f"| {name} | {', '.join(f'`{test}`' for test in kept[name])} |" for name in promised()]
    return "\n".join(lines)


def _table(name: str, rows: list[Row]) -> str:
    columns = TABLES[name]
    if name == "faults":
        rows = _by_kind(rows)
    lines = [[HEADINGS[name], *columns.values()], ["---", *("---:" for _ in columns)]]
    lines += [[row.what, *(_shown(row.figures[column]) for column in columns)] for row in rows]
    sums = [_sum([row.figures[column] for row in rows]) for column in columns]
    if name in ("faults", "inputs"):
        lines.append(["**all**", *(f"**{_shown(total)}**" for total in sums)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_kind(rows: list[Row]) -> list[Row]:
    """Rows of one kind, as "full disk: a series" and "full disk: a judge" are, as one."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.what.partition(": ")[0], []).append(row)
    return [
        Row(
            "faults",
            kind + (": " if ": " in of_kind[0].what else "") + "; ".join(_done_to(row) for row in of_kind),
            {column: _sum([row.figures[column] for row in of_kind]) for column in TABLES["faults"]},
        )
        if len(of_kind) > 1
        else of_kind[0]
        for kind, of_kind in kinds.items()
    ]


def _done_to(row: Row) -> str:
    return row.what.partition(": ")[2]


def _sum(figures: list[int | float | str]) -> int | float:
    return sum(figure for figure in figures if not isinstance(figure, str))


def _shown(figure: int | float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:,}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text(), read()[1]))


if __name__ == "__main__":
    main()

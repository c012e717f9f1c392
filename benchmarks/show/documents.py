"""The parts of the documentation that are written from committed figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from ..case import Case
from ..environment import ROOT
from ..results import Results, committed, newest_bars, newest_of
from .claims import claims_table
from .pictures import draw_all
from .tables import bars_markdown, markdown_table

DOCS = ROOT / "docs"
PAGE, ASSETS = DOCS / "benchmarks.md", DOCS / "assets" / "benchmarks"

# <!-- figures: SUITE/CASE --> ... <!-- end --> holds the table of a case; SUITE/bars the bars, SUITE/source
# where it was measured; viar/claims what all suites show of the paper. With "gpu" behind it, from the figures
# of a GPU; while there are none, gpu/source says so for all.
OPEN = "*No figures of a GPU are committed yet.*"
LEFT_OUT = "*Open: the committed run on a GPU did not get so far.*"
_BLOCK = re.compile(r"(<!-- figures: (\w+)/([\w-]+)( gpu)? -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str, suites: Mapping[str, ModuleType]) -> str:
    """The page with its blocks written anew.

    While there are no figures of a GPU, one block says so and the others are empty.

    Raises:
        ValueError: a block names a suite, a case or figures that do not exist.
    """

    def block(match: re.Match[str]) -> str:
        head, suite, what, gpu, end = match.groups()
        if suite not in suites:
            raise ValueError(f"{head.strip()}: no such suite, expected one of {sorted(suites)}")
        found = committed(suite, gpu=bool(gpu))
        if not found and not gpu:
            raise ValueError(f"{head.strip()}: benchmarks/results holds no figures of it")
        if found:
            text = _content(what, suites[suite].CASES, found)
        elif committed("gpu", gpu=True):
            text = LEFT_OUT
        elif (suite, what) == ("gpu", "source"):
            text = OPEN
        else:
            return f"{head}{end}"
        return f"{head}\n{text}\n\n{end}"

    return _BLOCK.sub(block, text)


Files = list[tuple[Path, Results]]  # committed ones of a suite, the newest first


def _content(what: str, cases: tuple[Case, ...], files: Files) -> str:
    if what == "bars":
        return bars_markdown(newest_bars(files))
    if what == "source":
        return _sources(cases, files)
    if what == "claims":
        return markdown_table(claims_table())
    named = {case.name: case for case in cases}
    found = newest_of(files, what)
    if what in named and found is None and files[0][1].environments[0]["gpu"]:
        return LEFT_OUT
    if what not in named or found is None:
        names = ", ".join(path.name for path, _ in files)
        raise ValueError(
            f"{names}: no figures of {what!r}, expected bars, source, claims or a case they hold"
        )
    return markdown_table(named[what].table(found[1].rows(what)))


def _sources(cases: tuple[Case, ...], files: Files) -> str:
    """Where the figures come from; by case, if they come from several files."""
    shown: dict[Path, tuple[Results, list[str]]] = {}
    for case in cases:
        if (found := newest_of(files, case.name)) is not None:
            shown.setdefault(found[0], (found[1], []))[1].append(case.name)
    if len(shown) < 2:
        return _source(*files[0])
    return "\n\n".join(
        _source(path, results, f"{', '.join(names)}: measured") for path, (results, names) in shown.items()
    )


def _source(path: Path, results: Results, measured: str = "Measured") -> str:
    first = results.environments[0]
    where = first["gpu"] or f"{first['cores']} cores of an {first['cpu']} ({first['cpu_capability']})"
    rounds = f"{results.options['rounds']} rounds"
    return (
        f"*{measured} on {where}, PyTorch {first['packages']['torch']}, {rounds}; every figure is in "
        f"`benchmarks/results/{path.name}`.*"
    )


def draw(suites: Mapping[str, ModuleType]) -> list[Path]:
    """Pictures of all committed figures of a CPU, into the documentation, which shows no others."""
    paths = []
    for name, suite in suites.items():
        files = committed(name)
        for case in suite.CASES:
            if (found := newest_of(files, case.name)) is not None:
                paths += draw_all([case], found[1], ASSETS, name)
    return paths

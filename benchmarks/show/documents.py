"""The parts of the documentation that are written from committed figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from ..case import Case
from ..environment import ROOT
from ..results import Results, committed
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
        if found is None and not gpu:
            raise ValueError(f"{head.strip()}: benchmarks/results holds no figures of it")
        if found is not None:
            text = _content(what, suites[suite].CASES, *found)
        elif committed("gpu", gpu=True) is not None:
            text = LEFT_OUT
        elif (suite, what) == ("gpu", "source"):
            text = OPEN
        else:
            return f"{head}{end}"
        return f"{head}\n{text}\n\n{end}"

    return _BLOCK.sub(block, text)


def _content(what: str, cases: tuple[Case, ...], path: Path, results: Results) -> str:
    if what == "bars":
        return bars_markdown(results.bars)
    if what == "source":
        return _source(path, results)
    if what == "claims":
        return markdown_table(claims_table())
    named = {case.name: case for case in cases}
    rows = results.rows(what)
    if what in named and not rows and results.environments[0]["gpu"]:
        return LEFT_OUT
    if what not in named or not rows:
        raise ValueError(
            f"{path.name} has no figures of {what!r}, expected bars, source, claims or a case it holds"
        )
    return markdown_table(named[what].table(rows))


def _source(path: Path, results: Results) -> str:
    first = results.environments[0]
    where = first["gpu"] or f"{first['cores']} cores of an {first['cpu']} ({first['cpu_capability']})"
    rounds = f"{results.options['rounds']} rounds"
    return (
        f"*Measured on {where}, PyTorch {first['packages']['torch']}, {rounds}; every figure is in "
        f"`benchmarks/results/{path.name}`.*"
    )


def draw(suites: Mapping[str, ModuleType]) -> list[Path]:
    """Pictures of all committed figures of a CPU, into the documentation, which shows no others."""
    paths = []
    for name, suite in suites.items():
        if (found := committed(name)) is not None:
            paths += draw_all(suite.CASES, found[1], ASSETS, name)
    return paths

"""What a suite declares: cases, what they measure, and what follows from the rows they give.

A suite is a module of `benchmarks.suites` whose docstring's first line says what it is about and whose
`CASES` lists its cases. Everything that is shown - bars, tables, pictures - is a function of rows as they
come out of JSON, so it can be made again from a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from matplotlib.axes import Axes

Row = dict[str, Any]  # JSON: settings of its point, usually "contender", and metrics
Settings = dict[str, Any]  # JSON


@dataclass(frozen=True)
class Run:
    """What a measurement may depend on besides its settings.

    Attributes:
        device: where tensors live.
        rounds: how often contenders are timed.
        quick: whether it only has to show that all runs.
    """

    device: torch.device
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Metric:
    """A column of rows that was measured, as opposed to chosen.

    Attributes:
        better: whether less or more of it is better; None where neither.
        noisy: whether it differs from run to run on one machine; if not, any change is worth a word.
    """

    better: Literal["lower", "higher"] | None = "lower"
    noisy: bool = False


SECONDS = Metric(noisy=True)
COUNT = Metric()


@dataclass(frozen=True)
class Bar:
    """A figure and the bar that it has to meet.

    Attributes:
        name: what was measured.
        value: the figure; NaN where nothing was measured.
        limit: the most it may be.
        note: what one should know beside the figure, such as the cases that break the bar.
    """

    name: str
    value: float
    limit: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        if math.isnan(self.value):
            return "not measured"
        return "pass" if self.value <= self.limit else "FAIL"

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity."""
        value = self.value if math.isfinite(self.value) else None
        return {**asdict(self), "value": value, "verdict": self.verdict}


def none_of(name: str, cases: list[str], note: str = "") -> Bar:
    """The bar that there be no such case."""
    return Bar(name, len(cases), 0, "; ".join([note] * bool(note) + cases))


def worst_of(name: str, figures: Mapping[str, float], limit: float, nobody: str = "nobody arrives") -> Bar:
    """The bar for the largest of several figures, with its case for a note; `nobody` if there are none."""
    worst = max(figures, key=lambda case: figures[case], default=nobody)
    return Bar(f"{name}, worst", figures.get(worst, math.nan), limit, worst)


@dataclass(frozen=True)
class Table:
    """Text cells, for the terminal and for Markdown. The first column is aligned left, the others right.

    Attributes:
        title: what the cells are.
        head: of the columns.
        lines: one cell a column.
    """

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure of panels.

    Attributes:
        paint: draws rows into as many panels as `panels` says.
        panels: of these rows: titles, in the order of the panels.
        columns: most panels beside one another.
        size: of a panel, inches.
    """

    paint: Callable[[list[Row], list[Axes]], None]
    panels: Callable[[list[Row]], Sequence[str]]
    columns: int = 4
    size: tuple[float, float] = (4.2, 3.2)


def no_bars(rows: list[Row]) -> list[Bar]:
    """Nothing to meet."""
    return []


@dataclass(frozen=True)
class Case:
    """One measurement over a grid of settings.

    Attributes:
        name: short, a word or two with hyphens.
        about: one line.
        build: measures one point of the grid: takes the run and the settings of the point as keywords, gives
            rows without these settings. Contenders of one point take turns in it.
        grid: settings of every point.
        quick: settings of every point of a quick run, which shows that all runs and means nothing.
        metrics: the measured columns.
        table: of rows.
        bars: of rows.
        picture: of rows, if there is one.
        solve: what `--profile` looks at: takes what `build` takes and gives one solve, whose cell runs under
            `record_function("cell")`.
    """

    name: str
    about: str
    build: Callable[..., Iterable[Row]]
    grid: Sequence[Settings]
    quick: Sequence[Settings]
    metrics: Mapping[str, Metric]
    table: Callable[[list[Row]], Table]
    bars: Callable[[list[Row]], list[Bar]] = field(default=no_bars)
    picture: Picture | None = None
    solve: Callable[..., Callable[[], object]] | None = None


def product(**choices: Iterable[Any]) -> list[Settings]:
    """The grid of all combinations, the last setting varying fastest."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

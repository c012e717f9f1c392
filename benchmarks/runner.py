"""Measures the cases of a suite, point by point; what was measured is on disk at once."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .case import Bar, Case, Run, Settings
from .environment import environment, hardware
from .results import Results, unused
from .show.tables import bars_table, terminal_table


def begin(suite: str, run: Run, resume: Path | None, out: Path) -> tuple[Results, Path]:
    """The results to add to, and their file.

    Raises:
        ValueError: `resume` holds another suite, other options, or figures of other hardware.
    """
    here = environment(run.device)
    options = {"device": run.device.type, "rounds": run.rounds, "quick": run.quick}
    if resume is None:
        results = Results(suite, options, [here])
        return results, unused(out / results.file_name)
    results = Results.load(resume)
    theirs = (results.suite, results.options, hardware(results.environments[0]))
    ours = (suite, options, hardware(here))
    if theirs != ours:
        raise ValueError(f"--resume: {resume} holds {theirs}, this run is {ours}; leave --resume out")
    unchanged = {name: value for name, value in here.items() if name != "date"}
    if unchanged != {name: value for name, value in results.environments[-1].items() if name != "date"}:
        results.environments.append(here)
    return results, resume


def measure(
    cases: Sequence[Case],
    names: Sequence[str],
    where: Mapping[str, Collection[str]],
    run: Run,
    results: Results,
    path: Path,
    console: Console,
    *,
    seconds: float = math.inf,
    keep_going: bool = False,
) -> bool:
    """Measure the points that `results` lacks, save after each, print tables and bars.

    Args:
        cases: of the suite.
        names: of the cases to measure.
        where: settings that points must have, as texts of which one must fit.
        run: how.
        results: to add to.
        path: their file.
        console: to print to.
        seconds: after which no point is begun; those that are left out are listed.
        keep_going: leave out points that raise, and tell why; else the first one ends all.

    Returns:
        Whether no point was left out because it raised.

    Raises:
        ValueError: no point has these settings.
    """
    chosen = [case for case in cases if case.name in names]
    todo, begin = points(chosen, run, where), time.perf_counter()
    left, whole = [], True
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for case, settings in todo:
            shown = ", ".join(f"{value}" for value in settings.values())
            progress.update(task, description=f"{case.name} {shown}"[:60])
            start = time.perf_counter()
            if not results.has(case.name, settings) and start - begin > seconds:
                left.append(f"{case.name} {shown}")
            elif not results.has(case.name, settings):
                try:
                    rows = list(case.build(run, **settings))
                except Exception:
                    if not keep_going:
                        raise
                    console.print(f"[red]raised, not measured:[/] {escape(f'{case.name} {shown}')}")
                    console.print_exception()
                    whole = False
                    continue
                results.add(case.name, settings, time.perf_counter() - start, rows)
                results.judge(judged(cases, results))
                results.save(path)
            progress.advance(task)
    for point in left:
        console.print(f"[yellow]time is up, not measured:[/] {escape(point)}")
    for case in chosen:
        results.arrange(case.name, case.quick if run.quick else case.grid)
        if rows := results.rows(case.name):
            console.print(terminal_table(case.table(rows), console.width))
    if run.quick:
        console.print("--quick: figures mean nothing")
    elif found := judged(chosen, results):
        console.print(bars_table(found))
    results.judge(judged(cases, results))
    results.save(path)
    return whole


def points(
    cases: Sequence[Case], run: Run, where: Mapping[str, Collection[str]]
) -> list[tuple[Case, Settings]]:
    """What there is to measure: points whose settings read as `where` says.

    Raises:
        ValueError: no point does.
    """
    found = []
    for case in cases:
        for settings in case.quick if run.quick else case.grid:
            if all(name in settings and str(settings[name]) in texts for name, texts in where.items()):
                found.append((case, settings))
    if not found:
        asked = " ".join(f"{name}={value}" for name, texts in where.items() for value in texts)
        raise ValueError(f"--where: no point of {', '.join(case.name for case in cases)} has {asked}")
    return found


def judged(cases: Sequence[Case], results: Results) -> list[Bar]:
    """Bars of all cases that have rows."""
    return [bar for case in cases if (rows := results.rows(case.name)) for bar in case.bars(rows)]


def about(suite: ModuleType) -> str:
    """Its docstring, and its cases."""
    width = max(len(case.name) for case in suite.CASES)
    lines = "\n".join(f"  {case.name:{width}}  {case.about}" for case in suite.CASES)
    return f"{(suite.__doc__ or '').strip()}\n\ncases:\n{lines}"

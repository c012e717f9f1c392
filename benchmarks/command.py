"""Measures deqlib and viar; draws, compares and publishes the figures."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from viar.files import replacing

from . import gpu
from .case import Run
from .measure import profiled
from .results import Results, unused
from .runner import about, begin, measure, points
from .show import compare, documents
from .show.pictures import draw_all
from .show.tables import terminal, terminal_table
from .suites import SUITES

EXIT_CODES = "exit code: 0 if every part ended, 1 if not, 2 if nothing was run"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: of the command line; default those of the process.

    Raises:
        SystemExit: the command ended with an error, which this holds.
    """
    options = _parser().parse_args(arguments)
    try:
        options.act(options, terminal())
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, suite in SUITES.items():
        _add_suite(commands, name, suite)
    _add_gpu(commands)
    plot = commands.add_parser("plot", help="draw the pictures of files of figures")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE")
    plot.add_argument("--out", type=Path, help="folder; default: that of each file")
    plot.set_defaults(act=_plot)
    comparison = commands.add_parser("compare", help="print what got worse from one file to another")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.add_argument(
        "--threshold", type=float, default=1.15, help="factor by which a time must differ (%(default)s)"
    )
    comparison.set_defaults(act=_compare)
    docs = commands.add_parser(
        "docs", help="write tables and pictures of docs/benchmarks.md from benchmarks/results"
    )
    docs.add_argument("--check", action="store_true", help="write nothing, fail if a table is not up to date")
    docs.set_defaults(act=_docs)
    return parser


def _add_suite(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, suite: ModuleType
) -> None:
    text = about(suite)
    parser = commands.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in suite.CASES]
    parser.add_argument("--quick", action="store_true", help="small and few: shows in minutes that all runs")
    parser.add_argument(
        "--case", nargs="+", choices=names, default=names, metavar="CASE", help="default: all"
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="SETTING=VALUE",
        help="only points of the grid with these settings, such as problem=mixer; of one named twice, either",
    )
    parser.add_argument("--rounds", type=int, help="times that everybody is timed (5, with --quick 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no point after so many")
    parser.add_argument("--device", default="cpu", help="where tensors live, such as cuda (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of the figures (%(default)s)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="measure what this file of figures lacks, and add it"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="leave out a point that raises, tell why, and go on"
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw none; `plot` does it later")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="measure nothing; profile a solve of each point: a trace, and where time goes outside the cell",
    )
    parser.set_defaults(act=_run, name=name, suite=suite)


def _add_gpu(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    names = list(gpu.NAMED)
    first, _, more = (gpu.__doc__ or "").strip().partition("\n\n")
    width = max(map(len, names))
    lines = "\n".join(f"  {part.name:{width}}  {part.about}" for part in gpu.NAMED.values())
    parser = commands.add_parser(
        "gpu",
        help=first.rstrip("."),
        description=f"{first}\n\n{more}\n\nparts:\n{lines}",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small and few: shows that all runs")
    parser.add_argument("--device", default="cuda", help="where tensors live (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all may take (%(default)s)")
    parser.add_argument(
        "--part", nargs="+", choices=names, default=names, metavar="PART", help="default: all"
    )
    parser.add_argument(
        "--out", type=Path, help="new or empty folder of all files; default: one under runs/gpu"
    )
    parser.set_defaults(act=_gpu)


def _gpu(options: argparse.Namespace, console: Console) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    out = unused(Path("runs/gpu/run")) if options.out is None else options.out
    reason = gpu.refusal(torch.device(options.device), quick=options.quick)
    if reason is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        reason = f"--out: expected a new or empty folder, {out} holds something"
    if reason is not None:
        print(reason, file=sys.stderr)
        raise SystemExit(2)
    names = [name for name in gpu.NAMED if name in options.part]
    run = Run(torch.device(options.device), gpu.ROUNDS, options.quick)
    if not gpu.ran(run, names, out.resolve(), deadline, console):
        raise SystemExit(1)


def _run(options: argparse.Namespace, console: Console) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32 everywhere
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 5)
    run = Run(torch.device(options.device), rounds, options.quick)
    where = _settings(options.where)
    if options.profile:
        _profile(options, run, where, console)
        return
    results, path = begin(options.name, run, options.resume, options.out)
    try:
        whole = measure(
            options.suite.CASES,
            options.case,
            where,
            run,
            results,
            path,
            console,
            seconds=60 * options.minutes,
            keep_going=options.keep_going,
        )
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; go on with --resume {path}" if path.exists() else "stopped") from None
    console.print(f"figures: {path}")
    if not options.no_pictures:
        for picture in draw_all(options.suite.CASES, results, path.parent, path.stem):
            console.print(f"picture: {picture}")
    if not whole:
        raise SystemExit("points were left out because they raised")


def _settings(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of every setting."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--where: expected SETTING=VALUE, got {text!r}")
        found.setdefault(name, []).append(value)
    return found


def _profile(options: argparse.Namespace, run: Run, where: dict[str, list[str]], console: Console) -> None:
    cases = [case for case in options.suite.CASES if case.name in options.case and case.solve is not None]
    if not cases:
        able = [case.name for case in options.suite.CASES if case.solve is not None]
        raise ValueError(f"--profile: nothing to profile here; cases of {options.name} that can be: {able}")
    for case, settings in points(cases, run, where):
        label = re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, settings.values())).lower()).strip("-")
        trace = options.out / f"{options.name}_{case.name}_{label}_trace.json.gz"
        assert case.solve is not None
        name = "generation" if options.name == "viar" else "solve"  # whose cells are its blocks
        table = profiled(case.solve(run, **settings), trace, name)
        console.print(f"{case.name}: {settings}")
        console.print(terminal_table(table, console.width))
        console.print(f"trace: {trace}")


def known() -> dict[str, ModuleType]:
    """By name, whatever there may be files of: the suites, and what runs them on a GPU."""
    return {**SUITES, "gpu": gpu}


def _suite_of(path: Path) -> tuple[Results, ModuleType]:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    results = Results.load(path)
    if results.suite not in known():
        raise ValueError(f"{path}: of suite {results.suite!r}, expected one of {list(known())}")
    return results, known()[results.suite]


def _plot(options: argparse.Namespace, console: Console) -> None:
    for path in options.files:
        results, suite = _suite_of(path)
        for picture in draw_all(suite.CASES, results, options.out or path.parent, path.stem):
            console.print(f"picture: {picture}")


def _compare(options: argparse.Namespace, console: Console) -> None:
    (before, suite), (after, other) = _suite_of(options.before), _suite_of(options.after)
    if suite is not other:
        raise ValueError(f"{options.before} is of {before.suite}, {options.after} of {after.suite}")
    for warning in compare.warnings(before, after):
        console.print(f"[yellow]note:[/] {warning}")
    for row in compare.lost(suite.CASES, before, after):
        console.print(f"[yellow]not in {options.after}:[/] {row}")
    found = compare.changes(suite.CASES, before, after, options.threshold)
    console.print(terminal_table(compare.table(found), console.width))


def _docs(options: argparse.Namespace, console: Console) -> None:
    before = documents.PAGE.read_text()
    after = documents.written(before, known())
    if options.check:
        if before != after:
            raise SystemExit(f"{documents.PAGE} is not up to date: run `python -m benchmarks docs`")
        return
    with replacing(documents.PAGE) as file:
        file.write(after.encode())
    console.print(f"written: {documents.PAGE}")
    for picture in documents.draw(known()):
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    main()

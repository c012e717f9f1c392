"""Running the parts one after another, and what came of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from xml.etree import ElementTree

import torch
from rich.console import Console

from ..case import Bar, Case, Metric, Row, Run, Settings, Table, none_of, product
from ..environment import ROOT
from ..results import Results
from ..runner import begin, measure
from ..runner import judged as bars_of
from ..show import listing
from ..show.tables import bars_table
from ..suites import SUITES
from .parts import NAMED, PARTS, command, tests_command, wanted

ENDED, FAILED, LATE, NOT_RUN = "ended", "failed", "out of time", "not run"
LEAST = 5.0  # seconds below which no part is begun
QUICK = 20.0  # seconds that a quick part leaves to each after it, its share being less than the rest
SHOWN = 25  # last lines of a part that failed
NOTE = 2000  # characters
# What the lack of a package leaves out.
OPTIONAL = {
    "torchdeq": "nothing of it is beside ours",
    "jsonschema": "the form of files of figures is not checked",
    "triton": "no steps are fused, and nothing can be compiled on a GPU",
}


@dataclass
class Session:
    """One run of parts.

    Attributes:
        run: how.
        names: of the parts, in their order.
        out: folder of all files.
        log: where the processes print.
        deadline: of the last part, `time.monotonic()`.
    """

    run: Run
    names: list[str]
    out: Path
    log: Path
    deadline: float

    def build(self, run: Run, part: str) -> Iterator[Row]:
        """Run a part within its share of the time that is left."""
        chosen = NAMED[part]
        start = time.monotonic()
        seconds = self.seconds(part, self.deadline - start)
        status, note = NOT_RUN, ""
        if seconds >= LEAST:
            print(f"{part}: {seconds:.0f} s at most", flush=True)
            if not chosen.suite:
                status, note = self._test(seconds)
            else:
                words = command(chosen, run, self.out, self.figures(chosen.suite), seconds)
                status, _ = self._process(words, seconds)
                if not chosen.profile:
                    status, note = self.judged(part, status)
        took = time.monotonic() - start
        print(f"{part}: {status} after {took:.0f} s{'; ' * bool(note)}{note}", flush=True)
        yield {"contender": part, "status": status, "seconds": [took], "limit": seconds, "note": note}

    def seconds(self, part: str, left: float) -> float:
        """What a part has of the seconds left: its share, or in a quick run more if there is enough."""
        rest = self.names[self.names.index(part) :]
        share = left * NAMED[part].share / sum(NAMED[name].share for name in rest)
        return max(share, left - QUICK * (len(rest) - 1)) if self.run.quick else share

    def figures(self, suite: str) -> Path | None:
        """The file of a suite, if a part made it."""
        return next(iter(sorted(self.out.glob(f"{suite}_*.json"))), None)

    def judged(self, part: str, status: str) -> tuple[str, str]:
        """The status, "out of time" if points are missing, and what is missing or was raised."""
        chosen = NAMED[part]
        path = self.figures(chosen.suite)
        results = None if path is None else Results.load(path)
        missing: list[tuple[Case, Settings]] = []
        raised: dict[str, dict[str, None]] = {}  # contenders, each once, by what they say
        points = wanted(chosen, self.run)
        for case, settings in points:
            if results is None or not results.has(case.name, settings):
                missing.append((case, settings))
                continue
            for row in results.rows(case.name):
                if settings.items() <= row.items() and row.get("error"):
                    raised.setdefault(row["error"], {})[row["contender"]] = None
        notes = [f"not measured: {points_told(missing, points)}"] * bool(missing)
        notes += [f"no figures of {', '.join(names)}: {error}" for error, names in raised.items()]
        return LATE if missing and status == ENDED else status, shorten("; ".join(notes), NOTE)

    def _test(self, seconds: float) -> tuple[str, str]:
        """Status of the tests, and how many passed, which failed."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            status, printed = self._process(tests_command(report), seconds)
            return status, told(report.read_text()) if report.exists() else cut(printed)

    def _process(self, words: list[str], seconds: float) -> tuple[str, str]:
        """Run a command into the log: its status, and what it printed.

        What it started ends with it, at the latest when its time is up.
        """
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",
            "DEQLIB_TEST_DEVICE": str(self.run.device),
        }
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n$ {shlex.join(words)}", file=log, flush=True)
            start = log.tell()
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = FAILED if process.wait(seconds) else ENDED
            except subprocess.TimeoutExpired:
                status = LATE
            finally:
                with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed = self.log.read_bytes()[start:].decode(errors="replace")
        if status == FAILED:
            print(*printed.splitlines()[-SHOWN:], sep="\n")
        return status, printed


def ran(run: Run, names: list[str], out: Path, deadline: float, console: Console) -> bool:
    """Run parts and print what came of them; whether all ended.

    Args:
        run: how.
        names: of the parts, in their order.
        out: folder of all files.
        deadline: of the last part, `time.monotonic()`.
        console: to print to.
    """
    results, path = begin("gpu", run, None, out)
    here = results.environments[0]
    minutes = max(0.0, deadline - time.monotonic()) / 60
    console.print(f"{here['gpu'] or here['cpu']}, PyTorch {here['packages']['torch']}", soft_wrap=True)
    console.print(f"{minutes:.1f} minutes for {', '.join(names)}; files in {out}", soft_wrap=True)
    for line in missing_packages():
        console.print(line, soft_wrap=True)
    session = Session(run, names, out, path.with_name(f"{path.stem}_log.txt"), deadline)
    out.mkdir(parents=True, exist_ok=True)
    grid = product(part=names)
    case = replace(CASE, build=session.build, grid=grid, quick=grid)
    measure([case], [case.name], {}, run, results, path, console)
    for name, suite in SUITES.items():
        figures = session.figures(name)
        if not run.quick and figures is not None and (found := bars_of(suite.CASES, Results.load(figures))):
            console.print(f"{name}:")
            console.print(bars_table(found))
    for file in sorted(out.iterdir()):
        console.print(str(file), soft_wrap=True)
    console.print(f"all tables: {session.log}", soft_wrap=True)
    others = [row["part"] for row in results.rows(case.name) if row["status"] != ENDED]
    parts = f"{len(others)} part{'s' * (len(others) != 1)} did not end: {', '.join(others)}"
    console.print(parts if others else "every part ended", soft_wrap=True)
    return not others


def points_told(some: list[tuple[Case, Settings]], points: list[tuple[Case, Settings]]) -> str:
    """Some of the points of a case by the settings in which points differ, or how many if they are all."""
    if len(some) == len(points):
        return f"{len(some)} of {len(points)} points"
    names = [name for name in points[0][1] if len({str(settings[name]) for _, settings in points}) > 1]
    return ", ".join(
        f"{case.name}: {' '.join(f'{name}={settings[name]}' for name in names)}" for case, settings in some
    )


def told(report: str) -> str:
    """What pytest's report in XML says, in words."""
    (suite,) = ElementTree.fromstring(report).iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    names = [
        f"{test.get('classname')}::{test.get('name')}"
        for test in suite.iter("testcase")
        if test.find("failure") is not None or test.find("error") is not None
    ]
    text = f"{passed} passed, {failed} failed, {counts['skipped']} skipped"
    return shorten(f"{text}: {'; '.join(names)}", NOTE) if names else text


def cut(printed: str) -> str:
    """How far pytest came before it was killed, in words, from the marks that it prints."""
    lines = re.findall(r"^([.FEsxX]+)(?: *\[ *(\d+)%\])?$", printed, re.MULTILINE)
    marks = "".join(line for line, _ in lines)
    percent = [int(share) for _, share in lines if share]
    failed = marks.count("F") + marks.count("E")
    shares = f"at {percent[-1]} %" if percent else "early"
    return f"cut {shares}: {marks.count('.')} passed, {failed} failed so far"


def refusal(device: torch.device, *, quick: bool) -> str | None:
    """Why there is nothing to measure here, if so."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "gpu: PyTorch sees no CUDA device here; --device cpu --quick shows that all runs"
    if device.type == "cpu" and not quick:
        return "gpu: the points of full size are for a GPU; --device cpu needs --quick"
    return None


def missing_packages() -> list[str]:
    """What is not installed and what that leaves out, a line each."""
    found = []
    for name, lack in OPTIONAL.items():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # of it, or of what it needs
            found.append(f"{error.name} is not installed: {lack}")
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """Every part ended."""
    return [none_of("parts that did not end", [row["part"] for row in rows if row["status"] != ENDED])]


def table(rows: list[Row]) -> Table:
    """One line a part."""
    columns = {
        "part": lambda row: row["part"],
        "status": lambda row: row["status"],
        "seconds": lambda row: f"{row['seconds'][0]:.0f}",
        "at most": lambda row: f"{row['limit']:.0f}",
        "note": lambda row: shorten(row["note"], 160, placeholder=" ..."),
    }
    return listing("parts", rows, columns)


def _unbound(run: Run, part: str) -> Iterator[Row]:
    raise ValueError("parts are measured by `python -m benchmarks gpu`")


CASE = Case(
    "parts",
    "what ran, and what came of it",
    _unbound,
    grid=product(part=[part.name for part in PARTS]),
    quick=product(part=[part.name for part in PARTS]),
    metrics={"status": Metric(None), "limit": Metric(None), "note": Metric(None), "seconds": Metric(None)},
    table=table,
    bars=bars,
)

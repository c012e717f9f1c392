"""The parts, in their order, and the commands that run them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..case import Case, Run, Settings
from ..environment import ROOT
from ..runner import points
from ..suites import SUITES

ROUNDS = 3  # of a run that is not quick
SLACK = 0.8  # of a part's time, after which it begins no further point


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: short.
        about: what it measures.
        share: of the time, relative to the others.
        suite: whose cases are measured; "" for the tests.
        cases: of the suite.
        where: settings that points must have.
        full: further ones of a full run.
        quick: further ones of a quick run.
        profile: whether points are profiled instead of measured.
    """

    name: str
    about: str
    share: float
    suite: str = ""
    cases: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    profile: bool = False


PARTS = (
    Part("tests", "tests of a GPU, beside the CPU in float64", 2.6),
    Part(
        "trunks",
        "VIAR and VAR of depth 30 and plain implementations: images/s, memory",
        2.2,
        "viar",
        ("trunks",),
        full=("dtype=bfloat16",),
    ),
    Part(
        "graphs",
        "generations with CUDA graphs beside eager",
        0.9,
        "viar",
        ("executions",),
        ("execution=graphs",),
    ),
    Part(
        "outside",
        "time and kernels a step outside of the cell, torchdeq's beside",
        0.8,
        "solvers",
        ("outside",),
    ),
    Part("training", "a training step, and memory against iterations", 0.7, "viar", ("training",)),
    Part(
        "solves",
        "time to a tolerance, torchdeq's beside",
        0.5,
        "solvers",
        ("solves",),
        full=("problem=MLP 8x256x512", "problem=transformer", "problem=convolution", "rtol=0.001"),
        quick=("problem=linear 0.9",),
    ),
    Part(
        "backward",
        "time of backward modes, torchdeq's beside",
        0.5,
        "backward",
        ("time",),
        full=("problem=MLP 8x256x512", "problem=transformer", "target=0.001"),
        quick=("problem=MLP 32x1x256",),
    ),
    Part(
        "profile-solve",
        "trace of a solve, and where its time goes",
        0.3,
        "solvers",
        ("outside",),
        full=("cell_ms=1.0",),
        quick=("cell_ms=0.1",),
        profile=True,
    ),
    Part(
        "profile-generation",
        "trace of a generation, and where its time goes",
        0.3,
        "viar",
        ("trunks",),
        full=("dtype=bfloat16", "depth=30", "iterations=[10, 2]", "decode=True"),
        quick=("decode=True",),
        profile=True,
    ),
    Part(
        "compiled", "compiled generations beside eager", 1.5, "viar", ("executions",), ("execution=compile",)
    ),
)
NAMED = {part.name: part for part in PARTS}


def command(part: Part, run: Run, out: Path, figures: Path | None, seconds: float) -> list[str]:
    """What runs a part that measures.

    Args:
        part: of a suite.
        run: its device and whether it is quick.
        out: folder of figures and traces.
        figures: file of its suite to add to; None if there is none yet.
        seconds: that it has.
    """
    words = [sys.executable, "-m", "benchmarks", part.suite, "--case", *part.cases]
    words += ["--device", str(run.device), "--out", str(out)]
    words += ["--quick"] if run.quick else ["--rounds", str(run.rounds)]
    if where := _where(part, run):
        words += ["--where", *where]
    if part.profile:
        return [*words, "--profile"]
    if figures is not None:
        words += ["--resume", str(figures)]
    return [*words, "--keep-going", "--no-pictures", "--minutes", f"{SLACK * seconds / 60:.3f}"]


def tests_command(report: Path) -> list[str]:
    """What runs the tests of a GPU; files without any are not even imported, which takes as long as running.

    Args:
        report: where pytest writes what came of each, as XML.
    """
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def wanted(part: Part, run: Run) -> list[tuple[Case, Settings]]:
    """The points that a part measures."""
    cases = [case for case in SUITES[part.suite].CASES if case.name in part.cases]
    where: dict[str, list[str]] = {}
    for text in _where(part, run):
        name, _, value = text.partition("=")
        where.setdefault(name, []).append(value)
    return points(cases, run, where)


def _where(part: Part, run: Run) -> tuple[str, ...]:
    return part.where + (part.quick if run.quick else part.full)

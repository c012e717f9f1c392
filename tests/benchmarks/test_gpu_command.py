"""`python -m benchmarks gpu`: parts in processes of their own, and what is told of them."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as start
from benchmarks import command, gpu, packages
from benchmarks.case import Run
from benchmarks.environment import ROOT
from benchmarks.gpu import parts, session
from benchmarks.gpu.parts import NAMED, PARTS
from benchmarks.results import COMMITTED, Results
from benchmarks.runner import begin
from benchmarks.show import documents
from benchmarks.suites.viar import executions

QUICK = Run(torch.device("cpu"), 3, True)
FULL = Run(torch.device("cuda"), 3, False)

ENDS = "print('all is well')"
FAILS = "print('before'); raise SystemExit('no such kernel')"
# A process that has another one, which goes on writing.
HANGS = """
import subprocess, sys, time
program = "import time\\nwhile True: print('still here', flush=True); time.sleep(0.05)"
subprocess.Popen([sys.executable, "-S", "-c", program])
time.sleep(60)
"""
PROFILES = ["profile-solve", "profile-generation"]  # parts of which no figures are expected


@pytest.fixture
def run_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[list[Any], str, bool]]:
    """Runs parts whose commands are these programs: rows, what was printed, and whether all ended."""

    def run(programs: dict[str, str], seconds: float) -> tuple[list[Any], str, bool]:
        def words(part: parts.Part, *_: Any) -> list[str]:
            return [sys.executable, "-S", "-c", programs[part.name]]

        monkeypatch.setattr(session, "command", words)
        console = Console(file=io.StringIO(), width=200)
        deadline = time.monotonic() + seconds
        ended = session.ran(QUICK, list(programs), tmp_path, deadline, console)
        (file,) = tmp_path.glob("gpu_*.json")
        return Results.load(file).rows("parts"), console.file.getvalue(), ended

    return run


def test_a_part_that_fails_or_hangs_loses_itself_alone(
    run_parts: Callable[..., tuple[list[Any], str, bool]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "LEAST", 0.01)
    monkeypatch.setitem(NAMED, "hangs", parts.Part("hangs", "", 0.3, "solvers", profile=True))
    names = ["hangs", *PROFILES]
    rows, printed, ended = run_parts(dict(zip(names, (HANGS, FAILS, ENDS), strict=True)), 12)
    assert not ended
    assert [(row["part"], row["status"]) for row in rows] == list(
        zip(names, ("out of time", "failed", "ended"), strict=True)
    )
    assert rows[0]["seconds"][0] < 20
    assert "no such kernel" in capfd.readouterr().out  # of a part that failed, its last lines
    assert printed.endswith(f"2 parts did not end: hangs, {PROFILES[0]}\n")
    assert "FAIL" not in printed  # of a quick run no figure means anything
    (log,) = tmp_path.glob("*_log.txt")
    lines = log.read_text().splitlines()
    assert {"still here", "before", "all is well"} <= set(lines)
    time.sleep(0.5)
    assert log.read_text().splitlines() == lines  # what it started was killed as well


def test_parts_that_find_no_time_left_are_told_as_not_run(
    run_parts: Callable[..., tuple[list[Any], str, bool]],
) -> None:
    rows, _, ended = run_parts(dict.fromkeys(PROFILES, ENDS), session.LEAST / 2)
    assert [row["status"] for row in rows] == ["not run", "not run"]
    assert not ended


def test_all_parts_that_ended_are_a_success(run_parts: Callable[..., tuple[list[Any], str, bool]]) -> None:
    rows, printed, ended = run_parts(dict.fromkeys(PROFILES, ENDS), 60)
    assert ended
    assert [row["note"] for row in rows] == ["", ""]
    # Each has what is left, so that what one leaves goes to those after it.
    assert rows[0]["limit"] == pytest.approx(60 - session.QUICK, abs=2)
    assert rows[1]["limit"] == pytest.approx(60, abs=5)
    assert "1.0 minutes for profile-solve, profile-generation; files in" in printed
    assert printed.endswith("_log.txt\nevery part ended\n")


def test_a_part_without_all_of_its_points_is_out_of_time_and_says_what_was_raised(tmp_path: Path) -> None:
    results, path = begin("solvers", QUICK, None, tmp_path)
    (_, first), (_, second) = parts.wanted(NAMED["outside"], QUICK)
    row = {"error": "ValueError: too large"}
    results.add(
        "outside", first, 1.0, [{**row, "contender": f"deqlib {name}"} for name in ("Anderson", "Broyden")]
    )
    results.save(path)
    here = session.Session(QUICK, [], tmp_path, tmp_path / "log.txt", 0.0)
    status, note = here.judged("outside", "ended")
    assert status == "out of time"
    assert note == (
        f"not measured: outside: cell_ms={second['cell_ms']}; "
        "no figures of deqlib Anderson, deqlib Broyden: ValueError: too large"
    )
    results.add("outside", second, 1.0, [{"contender": "deqlib Anderson", "error": None}])
    results.save(path)
    assert here.judged("outside", "ended")[0] == "ended"
    assert here.judged("outside", "failed")[0] == "failed"
    num = len(parts.wanted(NAMED["trunks"], QUICK))
    assert here.judged("trunks", "failed")[1] == f"not measured: {num} of {num} points"


@pytest.mark.parametrize("run", [QUICK, FULL], ids=["quick", "full"])
def test_every_part_has_points_and_a_command_that_asks_for_them(run: Run, tmp_path: Path) -> None:
    for part in PARTS[1:]:
        assert part.suite
        asked = parts.wanted(part, run)
        words = parts.command(part, run, tmp_path, tmp_path / "figures.json", 100.0)
        options = command._parser().parse_args(words[3:])
        assert [name for name in options.case if name in {case.name for case, _ in asked}] == list(part.cases)
        assert options.device == run.device.type
        assert options.quick == run.quick
        assert options.profile == part.profile
        if part.profile:
            assert len(asked) == 1  # or there would be more files than come back
        else:
            assert options.resume == tmp_path / "figures.json"
            assert options.minutes == pytest.approx(parts.SLACK * 100 / 60, abs=1e-3)
            assert options.keep_going
        if not run.quick:
            assert options.rounds == gpu.ROUNDS
            assert command._settings(options.where).keys() <= set(asked[0][1])


def test_parts_of_one_case_share_its_points() -> None:
    graphs, compiled = (
        [settings for _, settings in parts.wanted(NAMED[name], FULL)] for name in ("graphs", "compiled")
    )
    assert [*graphs, *compiled] == executions.CASE.grid


def test_only_files_with_tests_of_a_gpu_are_read_by_pytest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("test_a.py", "@pytest.mark.gpu"), ("test_b.py", "import tyro"), ("c.py", "mark.gpu")):
        (tmp_path / "tests" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / "sub" / name).write_text(text)
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    words = parts.tests_command(tmp_path / "report.xml")
    assert [word for word in words if word.endswith(".py")] == [str(tmp_path / "tests" / "sub" / "test_a.py")]
    assert words[words.index("-m", 3) + 1] == "gpu"


def test_the_report_of_pytest_is_told_by_counts_and_names_of_failures(tmp_path: Path) -> None:
    tests = tmp_path / "test_few.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('no GPU')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={report}"]
    subprocess.run([sys.executable, *words, str(tests)], capture_output=True, check=False, cwd=tmp_path)
    assert session.told(report.read_text()) == (
        "1 passed, 2 failed, 1 skipped: test_few::test_bad; test_few::test_broken"
    )


def test_tests_that_were_cut_tell_how_far_they_came(tmp_path: Path) -> None:
    tests = tmp_path / "test_many.py"
    tests.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(200))\n"
        "def test_one(i):\n"
        "    if i == 150: os._exit(9)\n"
        "    assert i != 7\n"
    )
    words = [
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--capture=sys",
        str(tests),
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert session.cut(done.stdout) == "cut at 72 %: 149 passed, 1 failed so far"
    assert session.cut("") == "cut early: 0 passed, 0 failed so far"


def test_the_tests_have_two_minutes_and_quick_parts_more_than_their_share_while_there_is_time() -> None:
    def seconds(run: Run, left: float) -> float:
        return session.Session(run, list(NAMED), Path(), Path(), 0.0).seconds("tests", left)

    assert seconds(FULL, 480) == pytest.approx(120, abs=2)
    assert seconds(QUICK, 480) == 480 - session.QUICK * (len(NAMED) - 1)
    assert seconds(QUICK, 100) == pytest.approx(seconds(FULL, 100))


def test_without_a_gpu_the_command_says_so_in_one_line_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, told in ((["gpu"], "no CUDA device"), (["gpu", "--device", "cpu"], "needs --quick")):
        with pytest.raises(SystemExit) as ended:
            command.main([*words, "--out", str(tmp_path)])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert told in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit) as ended:
        command.main(["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--out: expected a new or empty folder" in capsys.readouterr().err


def test_what_is_not_installed_is_said_with_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    for name in ("torchdeq", "rpds"):  # the latter jsonschema needs
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("jsonschema", "referencing")]:
        monkeypatch.delitem(sys.modules, name)
    assert gpu.session.missing_packages() == [
        "torchdeq is not installed: nothing of it is beside ours",
        "rpds is not installed: the form of files of figures is not checked",
    ]


def test_what_the_command_cannot_do_without_is_named_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    lacking = ("accelerate", "sklearn")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in lacking else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    with pytest.raises(SystemExit) as ended:
        start.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "gpu: not installed: accelerate, scikit-learn; install them or put their wheels into wheels/\n"
    )
    program = "import sys, benchmarks.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {*packages.REQUIRED, "deqlib", "viar"} & set(done.stdout.split())


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu_and_writes_files_that_can_be_read_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Takes two or three minutes; parts are given more, since other tests run beside it.
    arguments = f"--device cpu --quick --minutes 20 --out {tmp_path / 'out'}"
    done = subprocess.run(
        ["make", "--silent", "gpu", f"PYTHON={sys.executable}", f"ARGS={arguments}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) <= 8
    found = {results.suite: results for results in map(Results.load, (tmp_path / "out").glob("*.json"))}
    assert set(found) == {"gpu", "viar", "solvers", "backward"}
    rows = found["gpu"].rows("parts")
    assert {row["part"]: row["status"] for row in rows} == dict.fromkeys(NAMED, "ended")
    assert " passed, 0 failed" in rows[0]["note"]
    assert len([file for file in files if file.name.endswith("_trace.json.gz")]) == 2
    # As if a GPU had measured them, and they were committed.
    committed = shutil.copytree(COMMITTED, tmp_path / "committed")
    for results in found.values():
        results.environments[0] |= {"gpu": "Voodoo 2"}
        results.options["quick"] = False
        results.save(committed / results.file_name)
    monkeypatch.setattr("benchmarks.results.COMMITTED", committed)
    page = documents.written(documents.PAGE.read_text(), command.known())
    assert "Measured on Voodoo 2" in page
    assert documents.OPEN not in page
    assert documents.LEFT_OUT not in page

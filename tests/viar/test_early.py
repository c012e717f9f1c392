"""The command before PyTorch is there, and with streams that are closed, full or of few characters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from viar.early import is_command

ROOT = Path(__file__).parents[2]
# In place of PyTorch: signals come while it is imported, the second as the first is answered.
IMPORT = """
import os, signal, time
for _ in range({times}):
    try:
        os.kill(os.getpid(), {number})
        time.sleep(1)
    except BaseException:
        pass
"""


def run(shell: str, folder: Path | None = None, /, **variables: str) -> subprocess.CompletedProcess[str]:
    """`viar` followed by some shell, in a process of its own."""
    paths = [folder, ROOT, ROOT / "models"]
    variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m viar {shell}"],
        env={**os.environ, "PYTHONUNBUFFERED": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "viar: interrupted\n"), (signal.SIGTERM, 143, "viar: ended by SIGTERM\n")],
)
def test_signals_while_pytorch_is_imported_end_with_a_line(
    number: signal.Signals, code: int, line: str, times: int, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(IMPORT.format(number=int(number), times=times))
    ended = run("--version", tmp_path)
    assert (ended.returncode, ended.stderr) == (code, line)


INTERRUPTED_TWICE = """
import os, signal, sys
sys.orig_argv = ["python", "-m", "viar"]

import viar.commands.cli as cli

def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        {cleaning}

import viar.commands.parsing
viar.commands.parsing.parsed = lambda name, arguments: work
sys.argv = ["viar", "generate"]
try:
    cli.main()
finally:
    {ending}
"""


@pytest.mark.parametrize(
    ("cleaning", "ending"),
    [
        ("pass", "pass"),
        ("os.kill(os.getpid(), signal.SIGINT)", "pass"),
        ("pass", "os.kill(os.getpid(), signal.SIGINT)"),
    ],
)
def test_a_second_ctrl_c_while_the_first_is_answered_adds_nothing(cleaning: str, ending: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE.format(cleaning=cleaning, ending=ending)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, "viar: interrupted\n")


def test_other_processes_keep_their_signals() -> None:
    assert is_command(["-u", "/bin/viar", "generate"])
    assert is_command(["-m", "viar", "generate"])
    assert not is_command(["-c", "from multiprocessing.spawn import spawn_main", "--multiprocessing-fork"])
    assert not is_command(["-m", "pytest", "viar"])
    assert not is_command(["train.py", "viar"])
    assert not is_command([])


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lose_what_is_said_and_nothing_else(closed: str) -> None:
    ended = run(f"completion bash {closed}")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full_is_named(unbuffered: str) -> None:
    ended = run("--version > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert (ended.returncode, ended.stderr) == (2, "viar: standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_an_error_that_cannot_be_written_keeps_its_code() -> None:
    assert run("nothing 2> /dev/full").returncode == 2


def test_characters_that_a_terminal_cannot_show_are_escaped() -> None:
    ended = run("é", PYTHONIOENCODING="ascii")
    assert ended.returncode == 2
    assert r"got '\xe9'" in ended.stderr

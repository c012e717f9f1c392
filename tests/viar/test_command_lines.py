"""Random command lines: each does what was asked, or says why not and ends with code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_lines import did_what_was_asked, draw_line, make_world
from test_broken_pictures import judge_of_two_steps
from test_cli import call

import viar.commands.app
import viar.commands.demo

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
NUMBERS = range(300) if THOROUGH else range(40)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier of two steps, and of the demo and the page all that comes before their work."""
    judge_of_two_steps(monkeypatch)
    monkeypatch.setattr(viar.commands.app, "_check_gradio", lambda: None)
    monkeypatch.setattr(viar.commands.app, "_serve", lambda *_: None)
    monkeypatch.setattr(viar.commands.demo, "run_demo", lambda *_: {})


@pytest.mark.parametrize("number", NUMBERS)
def test_a_command_line_does_what_was_asked_or_says_in_a_line_why_not(
    number: int, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    line = draw_line(world, number)
    code, output, errors = call(*line.arguments)
    told = f"{' '.join(line.arguments)}\n{output}\n{errors}"
    assert "Traceback" not in output + errors, told
    if code == 0:
        assert not line.is_wrong, told
        assert did_what_was_asked(line, output), told
    else:
        assert code == 2, told
        assert len(errors + output) > 20, told


@pytest.mark.slow
def test_so_do_processes_of_their_own(world: Path) -> None:
    viar_command = Path(sys.executable).parent / "viar"
    for number in range(8):
        line = draw_line(world, 1000 + number)
        if line.arguments[0] in ("demo", "evaluate", "app"):
            continue
        ended: Any = subprocess.run(
            [viar_command, *line.arguments], capture_output=True, text=True, cwd=world
        )
        told = f"{' '.join(line.arguments)}\n{ended.stdout}\n{ended.stderr}"
        assert ended.returncode in (0, 2), told
        assert "Traceback" not in ended.stdout + ended.stderr, told
        assert ended.returncode or not line.is_wrong, told

"""Whatever is typed: a command does it, or says in a line why not, ends with 2 and writes nothing."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "viar"), str(HERE)]
import lines  # noqa: E402
from command_lines import make_world  # noqa: E402
from forks import Counted, Outcome, counted_in_forks  # noqa: E402

FIRST = 500_000  # number of the first line, which no trial while writing this had


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("nowhere")
    return folder


def _counted(world: Path, numbers: range, folder: str) -> Counted:
    """What comes of these lines, for a process of its own, see `calls.count_calls`."""
    from test_broken_pictures import judge_of_two_steps

    import viar.commands.app
    import viar.commands.demo

    tempfile.tempdir = folder
    os.environ["COLUMNS"] = "200"
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    judge_of_two_steps(patch)
    patch.setattr(viar.commands.demo, "run_demo", lambda *_: {})
    patch.setattr(viar.commands.app, "_serve", lambda *_: None)  # for ever

    def work(number: int) -> Outcome:
        draw = lines.drawn_of_benchmarks if number % 11 == 0 else lines.drawn
        return lines.watched(draw(world, number))

    return counted_in_forks(work, numbers, lines.SECONDS)


def test_a_line_with_mistakes_is_refused_in_a_line_and_touches_no_file_but_its_own(
    world: Path, tmp_path: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    numbers = range(FIRST, FIRST + times(30, 2_400))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        counted = pool.submit(_counted, world, numbers, str(tmp_path)).result()
    assert sum(counted.kinds.values()) == len(numbers)
    assert not counted.bad(), counted.bad()
    kinds = ("taken", "refused", "undocumented", "hung")
    told = {kind: counted.kinds[kind] for kind in kinds}
    what = "command lines of viar and of the benchmarks, with one to three mistakes"
    tally("inputs", what, inputs=len(numbers), **told)


def test_every_command_is_among_the_lines_and_all_of_its_flags_are_known() -> None:
    for command in lines.COMMANDS:
        assert len(lines.flags_of(command)) > 2 or command == "completion"


@pytest.mark.parametrize(
    ("code", "text", "wrong"),
    [
        (0, "", ""),
        (2, "viar: --out: expected a folder, got a file\n", ""),
        (2, "╭─ Parsing error ─╮\n│ x │\n", ""),
        (2, "", "0 lines"),
        (2, "viar: a long enough line\nviar: and another one\n", "2 lines"),
        (1, "viar: a long enough line\n", "code 1"),
        (2, "Traceback (most recent call last):\n", "traceback"),
    ],
)
def test_a_clear_end_is_told_from_others(code: int, text: str, wrong: str) -> None:
    assert lines.what_is_wrong(code, text) == wrong


def test_a_file_that_nobody_asked_for_is_seen(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    line = lines.Line(("--out", "mine"), tmp_path / "at", tmp_path, lambda: None)
    (tmp_path / "kept").write_text("a")
    before = lines.files_in(tmp_path)
    (tmp_path / "at" / "mine").write_text("asked for")
    assert not lines.written_astray(line, before, lines.files_in(tmp_path))
    (tmp_path / "other").write_text("not asked for")
    assert "other" in lines.written_astray(line, before, lines.files_in(tmp_path))

"""Whatever is typed: a command does it, or says in a line why not and ends with 2; and it writes nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "viar"), str(HERE)]
from calls import Counted, Outcome, count_forked, with_limit
from command_lines import make_world
from lines import Line, drawn, files_in, written_astray

FIRST = 500_000
SECONDS = 30  # of a processor; what a line of this world asks for takes less


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("nowhere")
    return folder


def test_a_line_that_cannot_be_done_says_so_in_a_line_and_leaves_all_files(
    world: Path, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    num, num_of_benchmarks = times(60, 2_200), times(10, 200)
    counted = counted_lines(world, num, num_of_benchmarks)
    assert sum(counted.kinds.values()) == num + num_of_benchmarks
    assert not counted.bad(), counted.bad()
    kinds = ("taken", "refused", "undocumented", "hung")
    told = {kind: counted.kinds[kind] for kind in kinds}
    what = "command lines of viar and of the benchmarks, with one to three mistakes"
    tally("inputs", what, inputs=num + num_of_benchmarks, **told)

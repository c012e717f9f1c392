"""Whatever a file holds, its reader gives a result or says what is wrong, soon and in little memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("reader_inputs.py")
COUNTED = ("inputs", "taken", "refused", "undocumented", "hung")
MOST_MEMORY = 2 * 2**20  # kilobytes that the process may ever have had, all readers and PyTorch together
# Readers of which most is Python, so that atheris sees what of it an input reaches.
GUIDED = (
    *("pictures, from memory", "headers of safetensors", "published checkpoints", "shards.json"),
    *("series.json", "reference statistics and images", "run.json", "metrics.jsonl"),
)


def told(*arguments: object) -> dict[str, Any]:
    """What the program says of each reader. That it says something is that nothing ended its process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "models"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def count(tally: Callable[..., None], found: dict[str, Any], ending: str = "") -> None:
    for what, counts in found.items():
        assert not counts["bad"], f"{what}: {counts['bad']}"
        figures = {name: counts.get(name, 0) for name in COUNTED}
        figures["inputs"] = sum(figures.values())
        tally("inputs", what + ending, **figures)


@pytest.mark.promise("A result or a reason")
def test_spoiled_files_are_read_or_refused_by_name(
    times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    found = told(times(3_000, 1_000_000))
    assert max(counts["peak"] for counts in found.values()) < MOST_MEMORY
    count(tally, found)


@pytest.mark.parametrize("reader", GUIDED)
def test_files_made_to_reach_every_line_of_a_reader_are_read_or_refused_by_name(
    reader: str, times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    inputs = times(0, 8_000)
    if not inputs or not (os.environ.get("ATHERIS") or importlib.util.find_spec("atheris")):
        pytest.skip("made with the package atheris, where all cases run")
    count(tally, told(inputs, "--guided", reader), ", guided by what they reach")

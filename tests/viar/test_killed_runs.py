"""A run that is killed at any instant, and started again, ends where a run that is left alone does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEADLOCK = 900.0  # seconds


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_instants_ends_with_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLOCK,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("the same bit for bit after 2 kills") == 2

"""Where Triton is, and files of tests that run themselves again where its kernels are interpreted.

Triton decides when it is imported whether that is so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the interpreter")
compiled = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="compiles with Triton")


def assert_passes_interpreted(file: str) -> None:
    """Run a file of tests in a process of its own with TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

"""Measurements of deqlib and viar: `python -m benchmarks SUITE`."""

import os

# PyTorch's profiler, which counts memory here, else tells on the terminal when it starts and stops. It reads
# this once, when PyTorch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

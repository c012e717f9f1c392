"""Run the tests and benchmarks that need a GPU, within --minutes.

The parts are tests and cases of the suites, most valuable first. Each runs in a process of its own within its
share of the time, so that one that hangs or crashes loses nothing but itself. Figures are on disk after every
point.
"""

from __future__ import annotations

from .parts import NAMED, ROUNDS
from .session import CASE, ran, refusal

__all__ = ["CASES", "NAMED", "ROUNDS", "ran", "refusal"]

CASES = (CASE,)

"""deqlib's solvers beside torchdeq's, scipy's and bare loops: evaluations, success, time and memory.

All of them may evaluate the cell as often, and take turns within every round. A tolerance is reached if the
largest relative residual of the batch, computed anew at the value returned, is within it.
"""

from __future__ import annotations

from . import memory, outside, overhead, robustness, small, solves, traces

CASES = (solves.CASE, traces.CASE, overhead.CASE, outside.CASE, small.CASE, memory.CASE, robustness.CASE)

"""Backward modes: time against torchdeq 0.1, accuracy against dense linear algebra, memory.

The reference of `accuracy` and `cosine` is the dense Jacobian of random small problems in float64. `time` has
the implicit backward pass alone, every contender with the loosest tolerance that meets one true residual of
the adjoint; `modes` whole training steps by every mode.
"""

from __future__ import annotations

from . import accuracy, cosine, memory, modes, times

CASES = (times.CASE, modes.CASE, accuracy.CASE, cosine.CASE, memory.CASE)

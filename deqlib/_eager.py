"""Calls that a compiler is not to look into.

To be imported when one is first met, not before: the decorator loads the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .solution import Solution


@torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator]
    reason="deqlib: a solve to a tolerance depends on the data, and so does an implicit backward pass; for "
    "fullgraph=True use Stopping.steps(n), and to train backward=JFB(), PhantomGradient() or Unroll()"
)
def solve_eagerly(solve: Callable[..., Solution], *args: Any, **settings: Any) -> Solution:
    """`solve(*args, **settings)`, as one break of the graph."""
    return solve(*args, **settings)

"""Solves that a compiler is not to look into. Imported when one first meets such a solve, not before:
the decorator loads the compiler."""

from __future__ import annotations

from typing import Any

import torch

from .fixed_point import fixed_point
from .solution import Solution


@torch.compiler.disable(  # type: ignore[no-untyped-call,untyped-decorator]
    reason="deqlib: a solve to a tolerance depends on the data, and so does an implicit backward pass; for "
    "fullgraph=True use Stopping.steps(n), and to train backward=JFB(), PhantomGradient() or Unroll()"
)
def solve_eagerly(*args: Any, **settings: Any) -> Solution:
    """`fixed_point`, as one break of the graph."""
    return fixed_point(*args, **settings)

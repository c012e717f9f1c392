"""Calls that a compiler is not to look into.

To be imported when one is first met, not before: the decorators load the compiler, which takes seconds.
"""

from __future__ import annotations

import functools
import logging

import torch

from ._compiler import run_eagerly
from ._torch import compile_nothing_in_transforms, is_func_active

# Without recursion: what is run takes the compiler out of force by itself, and back for the cell.
break_graph = torch.compiler.disable(  # type: ignore[no-untyped-call]
    run_eagerly,
    recursive=False,
    reason="deqlib: a solve to a tolerance depends on the data, and so does an implicit backward pass; for "
    "fullgraph=True use Stopping.steps(n), and to train backward=JFB(), PhantomGradient() or Unroll()",
)

break_graph_of_transform = torch.compiler.disable(  # type: ignore[no-untyped-call]
    run_eagerly,
    recursive=False,
    reason="deqlib: of the solves inside a transform of torch.func those of a fixed number of steps that are "
    "unrolled can be traced; for fullgraph=True use Stopping.steps(n) and backward=Unroll()",
)


# The decorator has it called for good while the compiler traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def give_up_transform() -> bool:
    """Let a transform that is being traced run as it is, with all that it calls, and say so.

    Returns:
        Whether there is one.
    """
    if not is_func_active():
        return False
    compile_nothing_in_transforms()
    _tell_of_transform()
    return True


@functools.cache
def _tell_of_transform() -> None:
    """Once a process. No warning: made an error by a filter, it would be one inside of the compiler."""
    logging.getLogger("deqlib").warning(
        "torch.compile: a solve inside a transform of torch.func (grad, vmap, jvp, ...) is not compiled but "
        "runs as it is, and so does the transform; to have them compiled use Stopping.steps(n) with "
        "backward=Unroll()"
    )

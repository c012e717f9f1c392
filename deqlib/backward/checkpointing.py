"""Evaluations that keep their arguments alone, and are made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils import checkpoint as checkpoints

from .._compiler import around
from .._scope import checkpoint_contexts
from .._torch import is_transformed, never_compiled


@dataclass(frozen=True)
class Checkpointed:
    """A function that keeps its arguments and is evaluated again in the backward pass.

    Args:
        function: to be evaluated.
        owner: the backward mode, for the message where it cannot be.
    """

    function: Callable[..., Any]
    owner: str

    @never_compiled
    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The function's value; inside a transform, which PyTorch cannot checkpoint, all is kept."""
        if is_transformed():
            return self.function(*args, **keywords)
        # Not compiled itself: PyTorch compiles no checkpoint that has contexts of its own.
        return around(self._kept, self.function, *args, **keywords)

    def _kept(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
        # Bound beforehand: names of the cell's inputs may be those of settings of `checkpoint`.
        bound = partial(function, **keywords)
        try:
            return checkpoints.checkpoint(bound, *args, use_reentrant=False, context_fn=checkpoint_contexts)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(
                f"{self.owner}(checkpoint=True): the cell uses transforms of torch.func, which PyTorch "
                f"cannot checkpoint; use {self.owner}() or ImplicitDifferentiation(), or torch.autograd.grad "
                "in the cell"
            ) from error

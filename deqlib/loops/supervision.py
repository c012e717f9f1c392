"""Deep supervision: a loss for each of several solves, each of which begins where the one before ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .._checks import check_instance, check_integer
from .._torch import tree_map
from ..layer import ImplicitLayer
from ..solution import Solution


def deep_supervision(
    layer: ImplicitLayer, *inputs: Any, num_solves: int, z0: Any = None, **keywords: Any
) -> Iterator[Solution]:
    """Solve several times, the state carried over and cut off from the graph in between.

        for solution in deep_supervision(layer, x, num_solves=16):
            loss(head(solution.value), y).backward()
            optimizer.step(), optimizer.zero_grad()

    No solve begins before the one before it was dealt with, so each sees the parameters as they are then, and
    memory is that of one. With `Stopping.steps(n)` it is the training of hierarchical and of tiny recursive
    models (Wang et al. 2025, arXiv 2506.21734; Jolicoeur-Martineau 2025, arXiv 2510.04871). Leave the loop to
    stop early; `z0=` of the next call carries the state on, `solution.value.detach()`.

    Args:
        layer: what is solved.
        inputs: of the layer.
        num_solves: most solves, at least 1.
        z0: where the first begins; default where the layer does.
        keywords: of the layer by name; settings of `ImplicitLayer.solve` too, for all solves.

    Yields:
        The `Solution` of each, its value carrying the gradient of that solve alone.

    Raises:
        TypeError, ValueError: `num_solves` is none; else see `ImplicitLayer.solve`.
    """
    check_instance("deep_supervision", ImplicitLayer, "a deqlib.ImplicitLayer", layer=layer)
    check_integer("deep_supervision", 1, num_solves=num_solves)
    return _solves(layer, inputs, num_solves, z0, keywords)


def _solves(
    layer: ImplicitLayer, inputs: tuple[Any, ...], num_solves: int, z0: Any, keywords: dict[str, Any]
) -> Iterator[Solution]:
    for _ in range(num_solves):
        solution = layer.solve(*inputs, z0=z0, **keywords)
        z0 = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, solution.value)
        yield solution
        del solution  # its graph, before the next one is made

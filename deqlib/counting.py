"""How often a cell is evaluated, on what, and how many products with its Jacobian are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._torch import tree_flatten, tree_unflatten


@dataclass
class CountedCell:
    """A cell that counts its evaluations, and does nothing else that the original does not.

    Attributes:
        cell: the original, `cell(z, *inputs) -> z`.
        evaluations: calls so far.
        samples: samples in all of them together: fewer than the batch each where samples had left it.
        recorded: evaluations on autograd's tape.
        products: vector-Jacobian products: how often a gradient arrived at the image of an evaluation. The
            last one of an implicit backward pass is not the adjoint solve's: it goes on to the inputs.
        gradient: the last of these gradients, shape of the image (of the first leaf of it that carries
            gradient); after an implicit backward pass the solution of the adjoint equation.
    """

    cell: Callable[..., Any]
    evaluations: int = 0
    samples: int = 0
    recorded: int = 0
    products: int = 0
    gradient: Tensor | None = None

    def __call__(self, z: Any, *inputs: Any, **keywords: Any) -> Any:
        """What the cell gives."""
        self.evaluations += 1
        image = self.cell(z, *inputs, **keywords)
        leaves, spec = tree_flatten(image)
        tensors = [(index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.samples += len(tensors[0][1]) if tensors else 0
        recorded = next(((index, leaf) for index, leaf in tensors if leaf.requires_grad), None)
        if recorded is None:
            return image
        self.recorded += 1
        # A hook on what the cell returns would stay on a tensor of the caller's, hence a view. Hooks that
        # others put on what is returned here may change the gradient and must act before ours, hence one
        # more. A product passes all leaves of a state, so one of them is enough.
        index, leaf = recorded
        watched = leaf.view_as(leaf)
        watched.register_hook(self._note)  # type: ignore[no-untyped-call]
        leaves[index] = watched.view_as(watched)
        return tree_unflatten(leaves, spec)

    def _note(self, grad: Tensor) -> None:
        self.products, self.gradient = self.products + 1, grad.detach()

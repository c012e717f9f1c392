"""Cells whose calls are told apart in a profile, backward as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

CELL = "cell"


def marked(cell: Callable[..., Any]) -> Callable[..., Any]:
    """The cell, every evaluation marked."""

    def call(*args: Any) -> Any:
        with record_function(CELL):
            return cell(*args)

    return call


def marked_both_ways(cell: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The cell, every evaluation and every product with its Jacobian marked; gradients of first order.

    Products for the state and those for the inputs are calls of their own, so that an adjoint solve pays for
    its own alone.
    """

    def call(z: Tensor, *inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            image: Tensor = marked(cell)(z, *inputs)
            return image
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in (z, *inputs)]
        image = marked(cell)(*leaves)
        for_state = _Part.apply(image, leaves[:1], z)  # type: ignore[no-untyped-call]
        for_inputs = _Part.apply(image, leaves[1:], *inputs)  # type: ignore[no-untyped-call]
        joined: Tensor = _Join.apply(for_state, for_inputs)  # type: ignore[no-untyped-call]
        return joined

    return call


class _Part(torch.autograd.Function):
    """The image, sending gradient to some of the arguments through the graph that lies behind its leaves."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, leaves: list[Tensor], *args: Tensor) -> Tensor:
        ctx.save_for_backward(image, *leaves)
        return image.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        image, *leaves = ctx.saved_tensors
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        product = marked(lambda u: torch.autograd.grad(image, wanted, u, retain_graph=True))
        found = iter(product(grads[0]))
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


class _Join(torch.autograd.Function):
    """What both parts are, sending gradient to both; PyTorch leaves out the part that nobody asks for."""

    @staticmethod
    def forward(ctx: Any, for_state: Tensor, for_inputs: Tensor) -> Tensor:
        return for_state.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0]

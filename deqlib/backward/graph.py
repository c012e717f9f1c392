"""What autograd's graph tells of an evaluation: the leaves it depends on, and products with its Jacobian.

A graph is walked from a result towards the leaves. The walk does not pass the points at which a tape was
started (`tape.start_of_tape`), in this solve or in one inside the cell: no gradient passes them either.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch import is_batched_gradient

VectorJacobianProduct = Callable[[Tensor], Tensor]  # u -> J^T u, both (B, D)


def nodes(tensors: Iterable[Tensor], known: Container[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph that made `tensors`, each once; not `known` ones, nor what lies behind these."""
    seen: set[object] = set()
    pending = [tensor.grad_fn for tensor in tensors]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen or node in known or getattr(node, "starts_tape", False):
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def leaves_of(output: Tensor, known: Container[Any] = ()) -> Iterator[Any]:
    """The nodes that accumulate the gradients of leaves, of the leaves that `output` depends on.

    Those of plain leaves have the leaf as `variable`. What lies behind `known` nodes is left out.
    """
    return (node for node in nodes([output], known) if not node.next_functions)


def depends_on_leaves(output: Tensor) -> bool:
    """Whether `output`, evaluated on the tape, has anything to send a gradient to besides its start."""
    if output.grad_fn is None:
        return output.requires_grad
    return any(True for _ in leaves_of(output))


def makers(tensors: Iterable[Tensor]) -> set[Any]:
    """The nodes that made those of `tensors` that are no leaves."""
    return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}


def vector_jacobian_product(u: Tensor, output: Tensor, source: Tensor) -> Tensor:
    """J^T u, (B, D), from the graph between a start of the tape and its image; may be called again.

    Args:
        u: (B, D).
        output: the image, (B, D).
        source: the point, (B, D), that the image was evaluated at.
    """
    with torch.enable_grad():
        (found,) = torch.autograd.grad(output, source, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if found is None else found


def refuse_batched_gradients(*gradients: Tensor) -> None:
    """Raise where a derivative is taken for many gradients or tangents by the predecessor of `torch.vmap`.

    Raises:
        RuntimeError: see above.
    """
    if not torch.compiler.is_compiling() and any(map(is_batched_gradient, gradients)):
        raise RuntimeError(
            "derivatives of a solve cannot be batched by is_grads_batched=True or vectorize=True; use "
            "torch.func.jacrev, jacfwd, hessian or vmap with backward=ImplicitDifferentiation()"
        )

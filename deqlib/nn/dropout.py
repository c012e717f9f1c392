"""Dropout for cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_instance, check_number, check_tensor, plain
from .._scope import current
from .._torch import is_func_active


class Dropout(nn.Module):
    """Dropout with one mask per sample and solve, in the forward and in the backward pass.

    `torch.nn.Dropout` in a cell draws at every evaluation, so that there is no fixed point to find. Here the
    mask is drawn at the first evaluation of a solve and is the same at all others, those of the backward
    pass included. Each solve draws its own, and two forwards before one backward keep theirs apart. Numbers
    are zeroed with probability p, the others are divided by 1 - p. In `eval()` it is the identity.
    (Gal & Ghahramani 2016, arXiv 1512.05287.)

    A module used twice in a cell, on inputs of one shape, has one mask. A solve inside a cell keeps its
    masks for the whole of the outer solve. Memory: one byte for each number of the mask, once a solve.

    Args:
        p: probability of a zero, in [0, 1].
        shared_axes: axes along which all places share one value. `(1,)` on tokens (B, L, C) drops whole
            channels, `(2,)` whole tokens; `(2, 3)` on images (B, C, H, W) whole feature maps. Never the
            first: samples do not share.
        generator: draws the masks, on any device; `None` uses PyTorch's default generator.

    Shape:
        Any (B, ...) to the same. With `compact`, the first axis must be the batch.

    Raises:
        RuntimeError: in training, called outside a solve: there is no telling which mask is meant. A
            recomputation by `torch.utils.checkpoint` inside the cell is such a call, see
            `deqlib.nn.checkpoint_contexts`. Under `torch.vmap` with another `randomness` than "same".
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        shared_axes: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_number("Dropout", 0, 1, p=p)
        p, shared_axes = plain(p), plain(shared_axes)
        if not isinstance(shared_axes, tuple) or not all(type(axis) is int for axis in shared_axes):
            raise TypeError(f"Dropout: shared_axes must be a tuple of axes, got {shared_axes!r}")
        if generator is not None:
            hint = "a torch.Generator or None"
            check_instance("Dropout", torch.Generator, hint, generator=generator)
        self.p, self.shared_axes, self.generator = p, shared_axes, generator

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the numbers that this solve drops set to zero, the others scaled up."""
        check_tensor("Dropout", input=x)
        if not self.training or self.p == 0:
            return x
        scope = current.scope
        if scope is None:
            raise RuntimeError(
                "Dropout: called outside a solve, so there is no mask to use; evaluate the cell in a block "
                "`with deqlib.nn.one_solve():`, or call eval() on it; inside torch.utils.checkpoint pass "
                "context_fn=deqlib.nn.checkpoint_contexts"
            )
        batch, *rest = self._mask_shape(x)
        device = x.device

        def draw(batch: int) -> Tensor:
            source = device if self.generator is None else self.generator.device
            # Not shaped like x by its methods: under a function transform x is a wrapper that ends with it.
            mask = torch.empty(batch, *rest, device=source, dtype=torch.bool)
            try:
                return mask.bernoulli_(self.p, generator=self.generator).to(device)
            except RuntimeError as error:
                if not is_func_active():
                    raise
                raise RuntimeError(
                    "Dropout: a solve draws one mask for the whole batch, which torch.vmap allows with "
                    'randomness="same" alone; use that, or give the samples as one batch, without vmap, so '
                    "that each has a mask of its own"
                ) from error

        dropped = scope.per_sample((self, tuple(rest), device), batch, draw)
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return x.masked_fill(dropped, 0) * scale

    def _mask_shape(self, x: Tensor) -> list[int]:
        """The shape of x with its shared axes of length 1."""
        shape = list(x.shape)
        for axis in self.shared_axes:
            if not -len(shape) < axis < len(shape) or axis == 0:
                raise ValueError(
                    "Dropout: shared_axes must be axes of the input and not the batch, "
                    f"got {self.shared_axes} for an input of shape {tuple(shape)}"
                )
            shape[axis] = 1
        if not shape:
            raise ValueError("Dropout: the first axis of the input is the batch, got a tensor without axes")
        return shape

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"p={self.p}" + (f", shared_axes={self.shared_axes}" if self.shared_axes else "")

"""States as the solvers see them: the only place that knows pytrees, dtypes and devices.

Outside, a state is a tensor or any pytree of tensors whose first axis is the batch. Inside, it is one
tensor of shape (B, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D)

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """How a pytree of tensors lies in one tensor of shape (B, D)."""

    spec: TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    dtype: torch.dtype  # of the flat tensor: the leaves' common type, at least float32

    def ravel(self, tree: Any) -> Tensor:
        """Pytree of this layout -> (B, D). Raises `ValueError` when `tree` is of another layout."""
        leaves, spec = tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(
                "cell: the output must have the structure of the state it was given, "
                f"expected {_describe(self.spec)}, got {_describe(spec)}"
            )
        leaves = [self._checked(i, leaf) for i, leaf in enumerate(leaves)]
        parts: list[Tensor] = [leaf.reshape(leaf.shape[0], _width(leaf.shape)) for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def unravel(self, flat: Tensor) -> Any:
        """(B, D) -> pytree, every leaf in its own shape and dtype."""
        parts = torch.split(flat, [_width(shape) for shape in self.shapes], 1)
        leaves = [
            part.reshape(shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def _checked(self, index: int, leaf: Any) -> Tensor:
        """Leaf `index` of a cell's output, compared with the state's, in the flat dtype."""
        where = "cell: the output" if len(self.shapes) == 1 else f"cell: leaf {index} of the output"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(leaf).__name__}")
        if leaf.shape != self.shapes[index]:
            raise ValueError(
                f"{where} must have the shape of the state, "
                f"expected {tuple(self.shapes[index])}, got {tuple(leaf.shape)}"
            )
        if leaf.device != self.device:
            raise ValueError(
                f"{where} must be on the device of the state, expected {self.device}, got {leaf.device}"
            )
        # Autocast picks output types by operation, so under it the type says nothing about the cell.
        if leaf.dtype != self.dtypes[index] and not torch.is_autocast_enabled(self.device.type):
            raise ValueError(
                f"{where} must have the dtype of the state, expected {self.dtypes[index]}, got {leaf.dtype}; "
                "start the solve from a state of the cell's own dtype (init=, or z0) or cast in the cell"
            )
        return leaf.to(self.dtype)


def flatten(cell: Callable[[Any], Any], z0: Any) -> tuple[Map, Tensor, Layout]:
    """The map and its starting point, flat.

    Args:
        cell: maps a state to a state of the same structure, shapes, dtypes and device.
        z0: pytree of floating-point tensors (B, ...), all on one device, all with the same B.

    Returns:
        `f` on (B, D), `z0` as (B, D), and the layout that leads back. Half-precision states are kept in
        float32 between evaluations; the cell still sees its own dtype.

    Raises:
        TypeError, ValueError: `z0` is no such pytree. `f` raises when the cell breaks the contract.
    """
    leaves, spec = tree_flatten(z0)
    if not leaves:
        raise ValueError("z0: the state must hold at least one tensor, got an empty pytree")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"z0: every leaf of the state must be a tensor, got {type(leaf).__name__}")
        if not leaf.is_floating_point():
            raise TypeError(f"z0: the state must be of floating-point dtype, got {leaf.dtype}")
        if leaf.dim() == 0:
            raise ValueError("z0: the first axis of the state is the batch, got a tensor without axes")
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                "z0: all leaves must share the batch axis, "
                f"got {leaves[0].shape[0]} and {leaf.shape[0]} samples"
            )
        if leaf.device != leaves[0].device:
            raise ValueError(
                f"z0: all leaves must be on one device, got {leaves[0].device} and {leaf.device}"
            )
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    layout = Layout(
        spec=spec,
        shapes=tuple(leaf.shape for leaf in leaves),
        dtypes=tuple(leaf.dtype for leaf in leaves),
        device=leaves[0].device,
        dtype=torch.float32 if dtype in _HALF else dtype,
    )

    def f(z: Tensor) -> Tensor:
        before = _version(z)
        image = layout.ravel(cell(layout.unravel(z)))
        if _version(z) != before:
            raise ValueError(
                "cell: the state must not be changed in place, got a cell that writes to its argument; "
                "use z = z * a instead of z.mul_(a)"
            )
        return image

    return f, layout.ravel(z0), layout


def _version(z: Tensor) -> int:
    """How often `z` was written to; 0 where PyTorch does not keep count."""
    return 0 if torch.compiler.is_compiling() or z.is_inference() else z._version


def _width(shape: torch.Size) -> int:
    """Numbers one sample holds in a leaf of `shape`."""
    return shape[1:].numel()


def _describe(spec: TreeSpec) -> str:
    """A pytree's structure as a reader would write it."""
    return repr(tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")

"""States as the solvers see them: the only place that knows pytrees, dtypes and devices.

Outside, a state is a tensor or any pytree of tensors whose first axis is the batch. Inside, it is one
tensor of shape (B, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._scope import Scope, current, current_or_new
from ._torch import (
    TreeSpec,
    times_written,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    without_graph,
)

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
    is_plain: bool  # the state is one tensor that lies as it is, in its own type

    def ravel(self, tree: Any) -> Tensor:
        """Pytree of this layout -> (B, D). Raises `ValueError` when `tree` is of another layout."""
        if self._fits(tree):  # the common case, without the cost of the general one
            flat: Tensor = tree.flatten(1)
            return flat
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
        if self.is_plain:
            return flat.view(self.shapes[0])
        parts = torch.split(flat, [_width(shape) for shape in self.shapes], 1)
        leaves = [
            part.reshape(shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def _fits(self, tree: Any) -> bool:
        return (
            self.is_plain
            and isinstance(tree, Tensor)
            and tree.shape == self.shapes[0]
            and tree.dtype == self.dtype
            and tree.device == self.device
        )

    def of_batch(self, batch: int) -> Layout:
        """The layout of another number of samples."""
        return replace(self, shapes=tuple(torch.Size((batch, *shape[1:])) for shape in self.shapes))

    def norms(self, flat: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Euclidean norms over these axes of every leaf, one for each place on the others: (B, places).

        Raises:
            ValueError: a leaf has no such axis, or it is the batch.
        """
        parts = torch.split(flat, [_width(shape) for shape in self.shapes], 1)
        norms = []
        for part, shape in zip(parts, self.shapes, strict=True):
            if not all(-len(shape) < axis < len(shape) and axis != 0 for axis in axes):
                raise ValueError(
                    f"Stopping: norm_axes must be axes of every leaf of the state and not the batch, "
                    f"got {axes} for a leaf of shape {tuple(shape)}"
                )
            leaf = part.reshape(len(flat), *shape[1:])
            # In float64 where there is one: squares of small or large numbers leave the range of float32.
            found = torch.linalg.vector_norm(leaf, dim=axes, dtype=small_dtype(flat)).to(flat.dtype)
            norms.append(found.flatten(1) if found.dim() > 1 else found.unsqueeze(1))
        return torch.cat(norms, 1)

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


# Equal to itself alone: the compilers of PyTorch below 2.12 hash it before it has its fields.
@dataclass(frozen=True, eq=False)
class FlatMap:
    """A cell bound to its inputs, on flat states."""

    cell: Callable[..., Any]
    inputs: tuple[Any, ...]
    layout: Layout
    axes: tuple[int | None, ...] | None = None  # the batch axis of every input; None: `AUTOMATIC` for all
    scope: Scope = field(default_factory=current_or_new)  # what modules in the cell remember

    def __call__(self, z: Tensor) -> Tensor:
        """The cell at `z`, (B, D) -> (B, D)."""
        before = _version(z)
        outer, current.scope = current.scope, self.scope
        try:
            # What `unravel` gives is the cell's own: it may ask for gradients, and `z` stays as it is.
            image = self.layout.ravel(self.cell(self.layout.unravel(z), *self.inputs))
        finally:
            current.scope = outer
        if image.requires_grad and not torch.is_grad_enabled():
            # A cell that takes gradients inside records what nobody asked for: every iterate would keep it.
            image = without_graph(image)
        if _version(z) != before:
            raise ValueError(
                "cell: the state must not be changed in place, got a cell that writes to its argument; "
                "use z = z * a instead of z.mul_(a)"
            )
        return image

    def take(self, samples: Tensor) -> FlatMap:
        """The map of these samples alone."""
        batch = self.layout.shapes[0][0]
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(self.inputs)
        inputs = tuple(cut(x, axis, batch, samples) for x, axis in zip(self.inputs, axes, strict=True))
        scope = self.scope.take(samples, batch)
        return replace(self, inputs=inputs, layout=self.layout.of_batch(len(samples)), scope=scope)

    @property
    def guess(self) -> str | None:
        """The inputs that `take` cuts by `AUTOMATIC`, and how to say it; `None` where the axes are given."""
        if self.axes is not None:
            return None
        batch = self.layout.shapes[0][0]
        shapes = [
            [str(tuple(leaf.shape)) for leaf in tree_leaves(value) if _is_as_long(leaf, batch)]
            for value in self.inputs
        ]
        axes = tuple(0 if found else None for found in shapes)
        named = [f"args[{i}] {' '.join(found[:3])}" for i, found in enumerate(shapes) if found]
        return (
            f"compact=True cuts every tensor as long as the batch of {batch} ({', '.join(named) or 'none'}); "
            f"if that is wrong, say it in a tuple, here compact={axes}, with the axis of the batch for every "
            "input and None for one that samples share"
        )

    @property
    def resolution(self) -> torch.dtype:
        """The coarsest type that the cell computes in, as far as its state and autocast tell."""
        types = list(self.layout.dtypes)
        if torch.is_autocast_enabled(self.layout.device.type):
            types.append(torch.get_autocast_dtype(self.layout.device.type))
        return max(types, key=lambda dtype: torch.finfo(dtype).eps)


AUTOMATIC = "automatic"


def cut(value: Any, axis: int | str | None, batch: int, samples: Tensor) -> Any:
    """An input of the cell with these samples alone.

    Every tensor in it is indexed along `axis`; with `AUTOMATIC` along the first axis, if that is as long
    as the batch; `None` leaves it as it is.
    """
    if axis is None:
        return value

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if axis == AUTOMATIC:
            return leaf.index_select(0, samples) if _is_as_long(leaf, batch) else leaf
        assert isinstance(axis, int)
        return leaf.index_select(axis, samples)

    return tree_map(one, value)


def _check_axes(inputs: tuple[Any, ...], axes: tuple[int | None, ...], batch: int) -> None:
    """Raise `ValueError` unless these axes of all tensors in the inputs are as long as the batch."""
    for index, (value, axis) in enumerate(zip(inputs, axes, strict=True)):
        for leaf in tree_leaves(value):
            if axis is None or not isinstance(leaf, Tensor):
                continue
            if not -leaf.dim() <= axis < leaf.dim() or leaf.shape[axis] != batch:
                raise ValueError(
                    f"compact: expected an input whose axis {axis} is the batch of {batch} samples, "
                    f"got a tensor of shape {tuple(leaf.shape)} in args[{index}]; the tuple holds the axis "
                    "of the batch for every input, None for one that samples share"
                )


def flatten(
    cell: Callable[..., Any],
    z0: Any,
    inputs: tuple[Any, ...] = (),
    axes: tuple[int | None, ...] | None = None,
) -> tuple[FlatMap, Tensor]:
    """The map and its starting point, flat.

    Args:
        cell: `cell(z, *inputs) -> z` of the same structure, shapes, dtypes and device.
        z0: pytree of floating-point tensors (B, ...), all on one device, all with the same B.
        inputs: further arguments of the cell.
        axes: the batch axis of every input, see `FlatMap.take`.

    Returns:
        `f` on (B, D), which knows the layout that leads back, and `z0` as (B, D). Half-precision states
        are kept in float32 between evaluations; the cell still sees its own dtype.

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
    if axes is not None:
        _check_axes(inputs, axes, leaves[0].shape[0])
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    flat_dtype = torch.float32 if dtype in _HALF else dtype
    first = leaves[0]
    layout = Layout(
        spec=spec,
        shapes=tuple(leaf.shape for leaf in leaves),
        dtypes=tuple(leaf.dtype for leaf in leaves),
        device=leaves[0].device,
        dtype=flat_dtype,
        is_plain=spec.is_leaf() and dtype == flat_dtype and first.dim() > 1 and first.numel() > 0,
    )
    return FlatMap(cell, inputs, layout, axes), layout.ravel(z0)


def _is_as_long(leaf: Any, batch: int) -> bool:
    """Whether `leaf` is a tensor whose first axis is as long as the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def small_dtype(z: Tensor) -> torch.dtype:
    """The type for what is small beside a state and wants precision: float64 where the device has it."""
    return z.dtype if z.device.type == "mps" else torch.float64


def _version(z: Tensor) -> int:
    """How often `z` was written to; 0 where PyTorch does not keep count."""
    return 0 if torch.compiler.is_compiling() or z.is_inference() else times_written(z)


def _width(shape: torch.Size) -> int:
    """Numbers one sample holds in a leaf of `shape`."""
    return shape[1:].numel()


def _describe(spec: TreeSpec) -> str:
    """A pytree's structure as a reader would write it."""
    return repr(tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")

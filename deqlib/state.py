"""States as the solvers see them: the only place that knows pytrees, dtypes and devices.

Outside, a state is a tensor or any pytree of tensors whose first axis is the batch. Inside, it is one
tensor of shape (B, D).
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._autocast import autocast_dtype, coarsest_dtype
from ._compiler import evaluate
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
from .starting import check_state, misfit, way_out_of_misfit
from .steps import Clock, Step

Map = Callable[[Tensor], Tensor]  # (B, D) -> (B, D)

_HALF = (torch.float16, torch.bfloat16)


class _Misshapen(ValueError):
    """The cell's output has another shape than the state."""


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
            leaves, spec = tree_flatten(
                _by_key(tree, tree_unflatten([None] * self.spec.num_leaves, self.spec))
            )
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
            and tree.layout == torch.strided
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
            is_axis = all(-len(shape) < axis < len(shape) and axis != 0 for axis in axes)
            if not is_axis or len({axis % len(shape) for axis in axes}) < len(axes):
                raise ValueError(
                    f"Stopping: norm_axes must be axes of every leaf of the state, each once, and not the "
                    f"batch, got {axes} for a leaf of shape {tuple(shape)}"
                )
            leaf = part.reshape(len(flat), *shape[1:])
            # In float64 where there is one: squares of small or large numbers leave the range of float32.
            found = torch.linalg.vector_norm(leaf, dim=axes, dtype=small_dtype(flat)).to(flat.dtype)
            norms.append(found.flatten(1) if found.dim() > 1 else found.unsqueeze(1))
        return torch.cat(norms, 1)

    def spread(
        self,
        places: Tensor,  # (B, places), as `norms` orders them
        axes: tuple[int, ...],
    ) -> Tensor:
        """What is known of each place, for each of its numbers: (B, D)."""
        parts = []
        for leaf, shape in zip(self.by_place(places, axes), self.shapes, strict=True):
            for axis in sorted(axis % len(shape) for axis in axes):
                leaf = leaf.unsqueeze(axis)
            parts.append(leaf.expand(len(places), *shape[1:]).flatten(1))
        return torch.cat(parts, 1)

    def by_place(
        self,
        places: Tensor,  # (B, places), as `norms` orders them
        axes: tuple[int, ...],
    ) -> list[Tensor]:
        """What is known of each place, leaf by leaf: of its shape without `axes`."""
        dropped = [{axis % len(shape) for axis in axes} for shape in self.shapes]
        shapes = [
            [size for axis, size in enumerate(shape) if axis > 0 and axis not in gone]
            for shape, gone in zip(self.shapes, dropped, strict=True)
        ]
        parts = torch.split(places, [math.prod(shape) for shape in shapes], 1)
        return [part.reshape(len(places), *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _checked(self, index: int, leaf: Any) -> Tensor:
        """Leaf `index` of a cell's output, compared with the state's, in the flat dtype."""
        where = "cell: the output" if len(self.shapes) == 1 else f"cell: leaf {index} of the output"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} must be a tensor, got {type(leaf).__name__}")
        if leaf.shape != self.shapes[index]:
            raise _Misshapen(
                f"{where} must have the shape of the state, "
                f"expected {tuple(self.shapes[index])}, got {tuple(leaf.shape)}"
            )
        if leaf.device != self.device:
            raise ValueError(
                f"{where} must be on the device of the state, expected {self.device}, got {leaf.device}"
            )
        if leaf.layout != torch.strided:
            raise TypeError(f"{where} must be dense, got a tensor of layout {leaf.layout}")
        # Autocast picks output types by operation, so under it the type says nothing about the cell.
        if leaf.dtype != self.dtypes[index] and autocast_dtype(self.device.type) is None:
            raise ValueError(
                f"{where} must have the dtype of the state, expected {self.dtypes[index]}, got {leaf.dtype}; "
                "start the solve from a state of the cell's own dtype (init=, or z0) or cast in the cell"
            )
        return leaf.to(self.dtype)


@dataclass
class LastAux:
    """What a cell returned beside the state at its last evaluation off the tape."""

    point: Tensor | None = None  # (B, D), where that was; `None`: there was none
    aux: Any = None


# Equal to itself alone: the compilers of PyTorch below 2.12 hash it before it has its fields.
@dataclass(frozen=True, eq=False)
class FlatMap:
    """A cell bound to its inputs, on flat states."""

    cell: Callable[..., Any]
    inputs: tuple[Any, ...]
    layout: Layout
    axes: tuple[int | None, ...] | None = None  # the batch axis of every input; None: `AUTOMATIC` for all
    keywords: dict[str, Any] = field(default_factory=dict)  # further inputs, by name
    is_cut: bool = False  # to some samples of the batch
    scope: Scope = field(default_factory=current_or_new)  # what modules in the cell remember
    last: LastAux | None = None  # if the cell returns something beside the state
    clock: Clock | None = None  # where to find the step, if the cell asks for it

    def __call__(self, z: Tensor) -> Tensor:
        """The cell at `z`, (B, D) -> (B, D)."""
        return self.with_aux(z)[0]

    def with_aux(self, z: Tensor) -> tuple[Tensor, Any]:
        """The cell at `z`, (B, D), and what it returns beside the state; `None` where it does not.

        Raises:
            TypeError, ValueError: the cell breaks the contract.
        """
        if self.last is not None:
            self.last.point = self.last.aux = None  # before as much memory is asked for again
        before = times_written(z)
        outer, current.scope = current.scope, self.scope
        try:
            # What `unravel` gives is the cell's own: it may ask for gradients, and `z` stays as it is.
            image, aux = self._evaluate(self.layout.unravel(z))
        finally:
            current.scope = outer
        if not torch.is_grad_enabled():
            # A cell that takes gradients inside records what nobody asked for: every iterate would keep it.
            image = _bare(image)
            if self.last is not None:
                self.last.point, self.last.aux = z, tree_map(_bare, aux)
                aux = self.last.aux
        if times_written(z) != before:
            raise ValueError(
                "cell: the state must not be changed in place, got a cell that writes to its argument; "
                "use z = z * a instead of z.mul_(a)"
            )
        return image, aux

    def _evaluate(self, state: Any) -> tuple[Tensor, Any]:
        """The cell at a state of the layout, its image flat, and what it returns beside it."""
        keywords = self.keywords if self.clock is None else {**self.keywords, "step": self._step(self.clock)}
        try:
            image, aux = evaluate(self.cell, state, *self.inputs, **keywords), None
        except (RuntimeError, IndexError) as error:
            # Who cuts the batch says what is wrong with a cut.
            said = None if self.is_cut else misfit(error, state, (self.inputs, self.keywords))
            if said is None:
                raise
            raise type(error)(said) from error
        if self.last is not None:
            image, aux = _parted(image)
        try:
            return self.layout.ravel(image), aux
        except _Misshapen as error:
            if self.is_cut:
                raise
            tensors = [x for x in tree_leaves((self.inputs, self.keywords)) if isinstance(x, Tensor)]
            way_out = way_out_of_misfit(self.layout.shapes[0][0], tensors)
            raise ValueError(f"{error}; {way_out}") from None

    def _step(self, clock: Clock) -> Step:
        """What the cell is told.

        Raises:
            RuntimeError: under `torch.vmap` one solve holds the samples of many batches.
        """
        step, batch = clock.step, self.layout.shapes[0][0]
        if step is None:  # outside of a solve's steps nothing was taken yet
            return Step(*torch.zeros(2, batch, dtype=torch.int64, device=self.layout.device))
        if len(step.number) != batch:
            raise RuntimeError(
                f"with_step: a solve under torch.vmap holds the samples of many batches, got steps of "
                f"{len(step.number)} samples for a batch of {batch}; make one batch of them without vmap"
            )
        return step

    def take(self, samples: Tensor) -> FlatMap:
        """The map of these samples alone."""
        batch = self.layout.shapes[0][0]
        axes = self.axes if self.axes is not None else (AUTOMATIC,) * len(self.inputs)
        inputs = tuple(cut(x, axis, batch, samples) for x, axis in zip(self.inputs, axes, strict=True))
        keywords = {name: cut(x, AUTOMATIC, batch, samples) for name, x in self.keywords.items()}
        scope = self.scope.take(samples, batch)
        layout = self.layout.of_batch(len(samples))
        clock = None if self.clock is None else self.clock.take(samples)
        part = replace(self, inputs=inputs, keywords=keywords, layout=layout, clock=clock)
        return replace(part, is_cut=True, scope=scope)

    @property
    def guess(self) -> str | None:
        """The inputs that `take` cuts by `AUTOMATIC`, and how to say it; `None` where the axes are given."""
        if self.axes is not None:
            return None
        batch = self.layout.shapes[0][0]

        def shapes(value: Any) -> str:
            found = [str(tuple(leaf.shape)) for leaf in tree_leaves(value) if _is_as_long(leaf, batch)]
            return " ".join(found[:3])

        by_place = [shapes(value) for value in self.inputs]
        axes = tuple(0 if found else None for found in by_place)
        named = [f"args[{i}] {found}" for i, found in enumerate(by_place) if found]
        by_name = {name: shapes(value) for name, value in self.keywords.items()}
        named += [f"{name} {found}" for name, found in by_name.items() if found]
        by_place_first = "pass inputs by position and " if any(by_name.values()) else ""
        return (
            f"compact=True cuts every tensor as long as the batch of {batch} ({', '.join(named) or 'none'}); "
            f"if that is wrong, {by_place_first}say it in a tuple, here compact={axes}, with the axis of the "
            "batch for every input and None for one that samples share"
        )

    @property
    def resolution(self) -> torch.dtype:
        """The coarsest type that the cell computes in, as far as its state and autocast tell."""
        return coarsest_dtype(self.layout.dtypes, self.layout.device.type)


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
    keywords: Mapping[str, Any] | None = None,
    *,
    has_aux: bool = False,
    with_step: bool = False,
) -> tuple[FlatMap, Tensor]:
    """The map and its starting point, flat.

    Args:
        cell: `cell(z, *inputs, **keywords) -> z` of the same structure, shapes, dtypes and device.
        z0: pytree of floating-point tensors (B, ...), all on one device, all with the same B.
        inputs: further arguments of the cell.
        axes: the batch axis of every input, see `FlatMap.take`.
        keywords: further arguments by name.
        has_aux: the cell returns a tuple, the state and something else.
        with_step: the cell is given a `Step` as its keyword `step`.

    Returns:
        `f` on (B, D), which knows the layout that leads back, and `z0` as (B, D). Half-precision states
        are kept in float32 between evaluations; the cell still sees its own dtype.

    Raises:
        TypeError, ValueError: `z0` is no such pytree. `f` raises when the cell breaks the contract.
    """
    leaves, spec = tree_flatten(z0)
    check_state(leaves)
    if not torch.compiler.is_compiling() and any(leaf.is_neg() for leaf in leaves):
        # Not every function takes a tensor that is to be negated when it is read, such as `z.conj().imag`.
        leaves = [leaf.resolve_neg() for leaf in leaves]
        z0 = tree_unflatten(leaves, spec)
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
    clock = Clock() if with_step else None
    last = LastAux() if has_aux else None
    f = FlatMap(cell, inputs, layout, axes, dict(keywords or {}), last=last, clock=clock)
    return f, layout.ravel(z0)


def _is_as_long(leaf: Any, batch: int) -> bool:
    """Whether `leaf` is a tensor whose first axis is as long as the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def small_dtype(z: Tensor) -> torch.dtype:
    """The type for what is small beside a state and wants precision: float64 where the device has it."""
    return z.dtype if z.device.type == "mps" else torch.float64


def _by_key(tree: Any, like: Any) -> Any:
    """`tree` with the keys of its dicts in the order of those in `like`, where both have the same."""
    if isinstance(tree, tuple | list) and type(tree) is type(like) and len(tree) == len(like):
        parts = [_by_key(a, b) for a, b in zip(tree, like, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if type(tree) not in (dict, OrderedDict, defaultdict) or type(tree) is not type(like):
        return tree
    if tree.keys() != like.keys():
        return tree
    items = {key: _by_key(tree[key], part) for key, part in like.items()}
    if isinstance(tree, defaultdict):
        return defaultdict(tree.default_factory, items)
    return OrderedDict(items) if isinstance(tree, OrderedDict) else items


def _parted(returned: Any) -> tuple[Any, Any]:
    """State and auxiliary output of a cell that returns both.

    Raises:
        TypeError: it does not.
    """
    if not (isinstance(returned, tuple) and len(returned) == 2):
        got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(
            f"cell: with has_aux=True it must return a tuple (z, aux), got {got}; leave has_aux out if it "
            "returns the state alone"
        )
    return returned


def _bare(leaf: Any) -> Any:
    """A tensor without the graph behind it; anything else as it is."""
    return without_graph(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _width(shape: torch.Size) -> int:
    """Numbers one sample holds in a leaf of `shape`."""
    return shape[1:].numel()


def _describe(spec: TreeSpec) -> str:
    """A pytree's structure as a reader would write it."""
    return repr(tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")

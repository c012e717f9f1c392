"""What is measured: a cell at its inputs, its graph at one point, and the care not to change the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._autocast import autocast_dtype
from .._torch import tree_leaves, tree_map
from ..backward.graph import vector_jacobian_product
from ..backward.tape import on_tape
from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..solution import Solution
from ..solvers import Auto, Solver
from ..starting import starting_point
from ..state import FlatMap, flatten
from ..stopping import Stopping
from .memory import parts_of

_TIGHT_STEPS = 100  # most steps of a tight solve


@dataclass(frozen=True)
class Subject:
    """A cell bound to copies of its inputs."""

    cell: Callable[..., Any]
    inputs: tuple[Any, ...]
    floating: tuple[Tensor, ...]  # the inputs that gradients are taken of: sparse ones only if asked for
    z0: Any
    f: FlatMap
    dtype: torch.dtype  # the coarsest type that the cell computes in

    @classmethod
    def of(
        cls, layer: ImplicitLayer, inputs: tuple[Any, ...], keywords: dict[str, Any], owner: str
    ) -> Subject:
        """The layer's cell at these inputs, or at what the layer's own `forward` or `solve` makes of them.

        Keyword inputs become the last of the inputs, a dict.

        Raises:
            ValueError: the state holds no number, or the cell is another map at every step; the error names
                `owner`.
        """
        if layer.with_step:
            raise ValueError(
                f"{owner}: a cell of with_step=True is another map at every step, and here one is looked at; "
                "give a layer whose cell is the map of one step, such as "
                "ImplicitLayer(lambda z, x: cell(z, x, step=Step(number, total)))"
            )
        floating: list[Tensor] = []

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # For sparse and nested tensors PyTorch has not every gradient that it has for dense ones.
            dense = leaf.layout == torch.strided and not leaf.is_nested
            wanted = leaf.is_floating_point() and (dense or leaf.requires_grad)
            leaf = leaf.detach().clone()
            if wanted:
                floating.append(leaf.requires_grad_())
            return leaf

        start, inputs, keywords = _first_evaluation(layer, inputs, keywords)
        inputs, keywords = tree_map(copy, inputs), tree_map(copy, keywords)
        with torch.no_grad():
            start = starting_point(layer.init, inputs, keywords) if start is None else start
            z0 = tree_map(torch.detach, start)
        cell = _StateAlone(layer.cell) if layer.has_aux else layer.cell
        if keywords:
            cell, inputs = _ByName(cell), (*inputs, keywords)
        f, flat = flatten(cell, z0, inputs)
        if not flat.numel():
            raise ValueError(
                f"{owner}: the state must hold at least one number, got {flat.shape[0]} samples of "
                f"{flat.shape[1]} numbers"
            )
        types = list(f.layout.dtypes)
        autocast = autocast_dtype(flat.device.type)
        if autocast is not None:
            types.append(autocast)
        dtype = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        return cls(cell, inputs, tuple(floating), z0, f, dtype)

    @property
    def eps(self) -> float:
        """Resolution of `dtype`."""
        return torch.finfo(self.dtype).eps

    @property
    def tight(self) -> Stopping:
        """As close as the type allows.

        The state of a cell in half precision is kept in float32, and its rounding errors average out.
        """
        return Stopping(rtol=(1 / 8 if self.eps > 1e-4 else 16) * self.eps, max_steps=_TIGHT_STEPS)

    def solve(self, start: Any, solver: Solver, stopping: Stopping) -> Solution:
        """Off the tape; a failure is neither an error nor a warning."""
        with torch.no_grad():
            return fixed_point(
                self.cell, start, self.inputs, solver=solver, stopping=stopping, on_failure="ignore"
            )

    def polish(self, solution: Solution) -> Solution:
        """Go on from what a solve found, by any method, to the fixed point next to it."""
        return self.solve(solution.value, Auto(), self.tight)

    def ravel(self, state: Any) -> Tensor:
        """Pytree -> (B, D)."""
        return self.f.layout.ravel(state)


class _Seen(BaseException):
    """Ends a forward pass at its first evaluation of the cell: what that was given. No `except` stops it."""

    def __init__(self, z: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.z = z
        self.inputs = inputs
        self.keywords = keywords


class _StateAlone(nn.Module):
    """A cell without what it returns beside the state; its parameters are the cell's."""

    def __init__(self, cell: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: Any, *inputs: Any, **keywords: Any) -> Any:
        image, _ = self.cell(z, *inputs, **keywords)
        return image


class _ByName(nn.Module):
    """A cell that takes its keyword inputs as the last positional one; its parameters are the cell's."""

    def __init__(self, cell: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: Any, *inputs: Any) -> Any:
        *positional, keywords = inputs
        return self.cell(z, *positional, **keywords)


def _first_evaluation(
    layer: ImplicitLayer, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Starting point and inputs of the cell; `None` and the same inputs for a layer that passes them on.

    A subclass may encode its inputs before it solves, and only its cell knows what arrives there.
    """
    kind = type(layer)
    if kind.forward is ImplicitLayer.forward and kind.solve is ImplicitLayer.solve:
        return None, inputs, keywords
    cell = layer.cell

    def look(z: Any, *arrived: Any, **named: Any) -> Any:
        raise _Seen(z, arrived, named)

    try:
        if isinstance(cell, nn.Module):
            hook = cell.register_forward_pre_hook(
                lambda _, arguments, named: look(*arguments, **named), with_kwargs=True
            )
        else:
            layer.cell = look
        with torch.no_grad():
            layer.forward(*inputs, **keywords)
    except _Seen as seen:
        return seen.z, seen.inputs, seen.keywords
    finally:
        if isinstance(cell, nn.Module):
            hook.remove()
        else:
            layer.cell = cell
    return None, inputs, keywords  # it has no use for its cell here


@dataclass(frozen=True)
class Linearization:
    """A map at one point, with the graph of its evaluation there: products with its Jacobian J.

    Samples do not depend on one another: a product multiplies every sample by a Jacobian of its own. All
    tensors are (B, D). The graph is kept as long as the object is.
    """

    f: FlatMap
    source: Tensor  # the point, at which the graph ends
    output: Tensor  # f there

    @classmethod
    def at(cls, f: FlatMap, z: Tensor) -> Linearization:
        """Evaluate the map once on the tape, at z (B, D)."""
        if autocast_dtype(z.device.type) is not None:
            # Autocast may hold weights that were cast without a graph, which would cut the one made here.
            torch.clear_autocast_cache()
        return cls(f, *on_tape(f, z))

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u; zero where the output carries no gradient."""
        if not self.output.requires_grad:
            return torch.zeros_like(u)
        return vector_jacobian_product(u, self.output, self.source)

    def forward_mode(self, v: Tensor) -> Tensor:
        """J v by forward-mode differentiation, at the cost of another evaluation."""
        with torch.no_grad():
            image: Tensor = torch.func.jvp(self.f, (self.source.detach(),), (v,))[1]
        return image

    def differentiated_twice(self, v: Tensor) -> Tensor:
        """J v as the derivative of J^T u, which is linear in u."""
        with torch.enable_grad():
            u = torch.zeros_like(v, requires_grad=True)
            (back,) = torch.autograd.grad(self.output, self.source, u, create_graph=True)
            (image,) = torch.autograd.grad(back, u, v)
        return image


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the shape, type and device of `like`, drawn in float32 where the generator is."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(like.device, like.dtype)


@contextmanager
def untouched(layer: ImplicitLayer, inputs: Any) -> Iterator[None]:
    """Measure with gradients enabled, and leave buffers and PyTorch's random numbers as they were.

    The buffers are those of the layer and of modules among the inputs.

    A cell may assign its buffers anew or write to them: both the tensor and its values are put back. Random
    numbers are those of the CPU and of the CUDA devices of the layer and the inputs.
    """
    leaves = tree_leaves(inputs)
    roots = [layer, *(leaf for leaf in leaves if isinstance(leaf, nn.Module))]
    modules = [module for root in roots for module in root.modules()]
    tensors = [*layer.parameters(), *layer.buffers(), *leaves]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), torch.inference_mode(False), torch.enable_grad():
        kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    setattr(module, name, buffer)
                    # Writing would end a graph of the caller's that holds the buffer.
                    if not all(map(torch.equal, parts_of(buffer), parts_of(value))):
                        buffer.copy_(value)

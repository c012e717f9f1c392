"""What is diagnosed: a cell at its inputs, and the care not to change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..fixed_point import fixed_point
from ..layer import ImplicitLayer
from ..solution import Solution
from ..solvers import Auto, Solver
from ..state import FlatMap, flatten
from ..stopping import Stopping

_TIGHT_STEPS = 100  # most steps of a tight solve


@dataclass(frozen=True)
class Subject:
    """A cell bound to copies of its inputs."""

    cell: Callable[..., Any]
    inputs: tuple[Any, ...]
    floating: tuple[Tensor, ...]  # the inputs that gradients are taken of
    z0: Any
    f: FlatMap
    eps: float  # resolution of the coarsest type that the cell computes in
    dtype: torch.dtype  # that type

    @classmethod
    def of(cls, layer: ImplicitLayer, inputs: tuple[Any, ...], owner: str = "diagnose") -> Subject:
        """The layer's cell at these inputs; raises where there is no state to speak of."""
        floating: list[Tensor] = []

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach().clone()
            if leaf.is_floating_point():
                floating.append(leaf.requires_grad_())
            return leaf

        inputs = tree_map(copy, inputs)
        with torch.no_grad():
            z0 = tree_map(torch.detach, layer._start(inputs))
        f, flat = flatten(layer.cell, z0, inputs)
        if not flat.numel():
            raise ValueError(
                f"{owner}: the state must hold at least one number, got {flat.shape[0]} samples of "
                f"{flat.shape[1]} numbers"
            )
        types = list(f.layout.dtypes)
        if torch.is_autocast_enabled(flat.device.type):
            types.append(torch.get_autocast_dtype(flat.device.type))
        dtype = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        return cls(layer.cell, inputs, tuple(floating), z0, f, torch.finfo(dtype).eps, dtype)

    def solve(self, start: Any, solver: Solver, stopping: Stopping) -> Solution:
        """Off the tape, whatever comes of it."""
        with torch.no_grad():
            return fixed_point(
                self.cell, start, self.inputs, solver=solver, stopping=stopping, on_failure="ignore"
            )

    @property
    def tight(self) -> Stopping:
        """As close as the type allows.

        The state of a cell in half precision is kept in float32, and its rounding errors average out.
        """
        return Stopping(rtol=(1 / 8 if self.eps > 1e-4 else 16) * self.eps, max_steps=_TIGHT_STEPS)

    def polish(self, solution: Solution) -> Solution:
        """Go on from what a solve found, by any method, to the fixed point next to it."""
        return self.solve(solution.value, Auto(), self.tight)

    def ravel(self, state: Any) -> Tensor:
        """Pytree -> (B, D)."""
        return self.f.layout.ravel(state)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, drawn where the generator is."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(like.device, like.dtype)


def labels(settings: Sequence[Any]) -> list[str]:
    """Class names; of several of one class the fields that tell them apart too."""
    names = []
    for one in settings:
        same = [other for other in settings if type(other) is type(one)]
        known = fields(one) if is_dataclass(one) else ()
        differing = [
            f.name for f in known if any(getattr(one, f.name) != getattr(other, f.name) for other in same)
        ]
        details = ", ".join(f"{name}={getattr(one, name)!r}" for name in differing)
        names.append(type(one).__name__ + (f"({details})" if details else ""))
    return names


@contextmanager
def untouched(layer: ImplicitLayer, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Gradients on, whatever the caller has; buffers and random numbers as before in the end."""
    tensors = [*layer.parameters(), *layer.buffers(), *tree_leaves(inputs)]
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), torch.inference_mode(False), torch.enable_grad():
        kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in layer.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)

"""Nested values with tensors between the main process, which has them whole, and all that train together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shared(value: object) -> TypeGuard[DTensor]:
    """Whether it is a tensor that processes have shares of.

    What makes such tensors has imported their class, which takes a second that most runs can do without.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def placed_like(tensor: Tensor, like: DTensor) -> Tensor:
    """A tensor that every process has, in shares like those of another; all processes call it together."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may have a share; all processes call it together."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def to_main(values: Any, *, is_main: bool) -> Any:
    """Nested values with every tensor whole, in the main process; others only take part in the gathering.

    All processes call it together. Tensors that were shared come to the CPU one by one.

    Args:
        values: of this process.
        is_main: whether this is the main process.
    """
    if is_shared(values):
        whole = gathered(values)
        return whole.cpu() if is_main else None
    if isinstance(values, Mapping):
        return {name: to_main(value, is_main=is_main) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [to_main(value, is_main=is_main) for value in values]
    return values


def from_main(values: Any, like: Any, device: torch.device) -> Any:
    """The main process's nested values, in every process; all call it together.

    Args:
        values: in the main process; others give anything.
        like: nested in the same way. Where it has a tensor of the same shape of which each process has a
            share, so it will be with the new one; a tensor stands for all that is nested in its place. Other
            tensors come whole, on the CPU.
        device: by which the processes reach one another.
    """
    if not dist.is_initialized():
        return values
    is_main = dist.get_rank() == 0
    plan = [_without_numbers(values)] if is_main else [None]
    dist.broadcast_object_list(plan, src=0)
    return _filled(plan[0], values if is_main else None, like, device)


def _without_numbers(values: Any) -> Any:
    if isinstance(values, Tensor):
        return torch.empty(values.shape, dtype=values.dtype, device="meta")
    if isinstance(values, dict):
        return {name: _without_numbers(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_numbers(value) for value in values]
    return values


def _filled(plan: Any, values: Any, like: Any, device: torch.device) -> Any:
    """`plan` with numbers in its tensors, which the main process alone has in `values`."""
    if isinstance(plan, dict):
        return {
            name: _filled(part, _inside(values, name), _inside(like, name), device)
            for name, part in plan.items()
        }
    if isinstance(plan, list):
        return [_filled(part, _inside(values, i), _inside(like, i), device) for i, part in enumerate(plan)]
    if not isinstance(plan, Tensor):
        return plan
    tensor = torch.empty_like(plan, device=device) if values is None else values.to(device).contiguous()
    if is_shared(like) and like.shape == tensor.shape:
        return placed_like(tensor, like)
    dist.broadcast(tensor, src=0)
    return tensor.cpu()


def _inside(values: Any, name: Any) -> Any:
    """What is nested in `values` under a name, if that is there."""
    if isinstance(values, Mapping):
        return values.get(name)
    if isinstance(values, list | tuple):
        return values[name] if name < len(values) else None
    return values

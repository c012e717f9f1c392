"""How many kernels a computation starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from deqlib._torch import TorchDispatchMode


def num_kernels(compute: Callable[[], object], device: torch.device) -> int:
    """Kernels of one call: on a GPU those that its profiler saw, copies aside; else operations, views aside.

    A CPU has no kernels to count. Its operations are those that would start one each, were nothing fused.

    Args:
        compute: what is counted; it should have run before, since the first call also sets up.
        device: where its tensors are.
    """
    if device.type != "cuda":
        with _Operations() as operations:
            compute()
        return int(operations.count)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        compute()
        torch.cuda.synchronize(device)
    return len([event for event in profiler.events() or () if _is_kernel(event)])


def _is_kernel(event: Any) -> bool:
    on_device = str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    return on_device and not event.name.startswith(("Memcpy", "Memset"))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes new values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))

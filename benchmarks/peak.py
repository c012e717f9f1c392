"""Peak memory, counted exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(compute: Callable[[], object], device: torch.device | None = None) -> int:
    """Most bytes allocated during `compute()` beyond what was allocated before.

    On the CPU every allocation and release that PyTorch makes is counted, so the figure is the same on every
    machine. On a GPU it is what PyTorch's allocator says of it.

    Args:
        compute: what is measured.
        device: whose memory; default the CPU's.
    """
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = compute()
    del result
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda record: record[0]):
        total += change
        peak = max(peak, total)
    return peak

"""Peak memory, counted exactly."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(compute: Callable[[], object]) -> int:
    """Most bytes allocated during `compute()` beyond what was allocated before, on the CPU.

    Every allocation and release that PyTorch makes is counted, so the figure is the same on every machine.
    """
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

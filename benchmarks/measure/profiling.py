"""Where the time of a solve goes outside the cell."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..case import Table
from .marks import CELL

SHOWN = 12  # operations


def profiled(solve: Callable[[], object], trace: Path, name: str = "solve") -> Table:
    """Run twice, the second time under PyTorch's profiler; write the trace for Perfetto or chrome://tracing.

    The trace is compressed if its name ends in .gz; both read it so.

    The table has the CPU time of operations outside the cell, their own time without that of what they call.
    On a GPU that is the time of launching; the trace shows the kernels. `name` is what is run, for the title.
    """
    solve()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # In this thread backward passes of a GPU too, so that the table has them.
    in_order = torch.autograd.set_multithreading_enabled(False)
    with in_order, profile(activities=activities) as profiler, record_function("solve"):
        solve()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return _table([event for event in profiler.events() if event.name == "solve"], name)


def _table(roots: Iterable[Any], name: str) -> Table:
    outside: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    inside = total = 0.0
    pending = list(roots)
    for event in pending:
        total += event.cpu_time_total
    while pending:
        event = pending.pop()
        calls[event.name] += 1
        if event.name == CELL:
            inside += event.cpu_time_total
        else:
            outside["Python" if event.name == "solve" else event.name] += event.self_cpu_time_total
            pending += event.cpu_children
    calls["Python"] = calls.pop("solve", 0)
    found = sorted(outside.items(), key=lambda item: -item[1])
    rest = sum(time for _, time in found[SHOWN:])
    lines = [(of, str(calls[of]), *_cells(time, total)) for of, time in found[:SHOWN]]
    lines.append(("others", "", *_cells(rest, total)))
    lines.append(("all outside the cell", "", *_cells(sum(outside.values()), total)))
    lines.append(("the cell", str(calls[CELL]), *_cells(inside, total)))
    return Table(f"time of one {name}", ("operation", "calls", "ms", "share"), lines)


def _cells(microseconds: float, total: float) -> tuple[str, str]:
    return f"{microseconds / 1e3:.3f}", f"{microseconds / total:.1%}" if total else "-"

"""Peak memory, counted exactly, or as the system sees it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..environment import ROOT


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


def peak_rss(make: Callable[..., Callable[[], object]], **settings: Any) -> int | None:
    """Most resident memory of a process of its own during a computation, beyond what it had before, bytes.

    Args:
        make: a function of a module; called there with the settings, it gives the computation. It may warm
            up what is not to be measured.
        settings: JSON.

    Returns:
        None where the system does not tell (it takes Linux).

    Raises:
        RuntimeError: the process failed; the message holds what it printed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    request = json.dumps([make.__module__, make.__qualname__, settings])
    # The package itself imports this file, so that `-m` would run it a second time.
    command = [sys.executable, "-c", "from benchmarks.measure.peak import _answer; _answer()", request]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{request} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def _measure_rss(module: str, name: str, settings: dict[str, Any]) -> int:
    compute = getattr(importlib.import_module(module), name)(**settings)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, see proc(5)
    before = _kilobytes("VmRSS")
    compute()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _answer() -> None:
    """In the process that was started: measure what is asked for."""
    print(_measure_rss(*json.loads(sys.argv[1])))

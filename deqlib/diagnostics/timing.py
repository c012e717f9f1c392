"""Times of several things to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def interleaved_times(
    contenders: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[tuple[float, ...]]:
    """Seconds of each contender, one a round.

    They take turns, so that whatever else goes on meets all alike. The host waits for the device before and
    after each.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for compute, seconds in zip(contenders, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            compute()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return [tuple(seconds) for seconds in times]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

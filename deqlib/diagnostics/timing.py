"""Times of several things to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


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
            seconds.append(_timed(compute, device)[1])
    return [tuple(seconds) for seconds in times]


def interleaved_stages(
    contenders: Sequence[tuple[Callable[[], T], Callable[[T], object]]], rounds: int, device: torch.device
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Seconds of both stages of each contender, and of the second, which takes what the first gives.

    They take turns as in `interleaved_times`.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for _ in range(rounds):
        for (first, second), seconds in zip(contenders, times, strict=True):
            between, before = _timed(first, device)
            after = _timed(partial(second, between), device)[1]
            seconds.append((before + after, after))
    return [(tuple(a for a, _ in seconds), tuple(b for _, b in seconds)) for seconds in times]


def _timed(compute: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What it gives, and in how many seconds."""
    _wait(device)
    start = time.perf_counter()
    found = compute()
    _wait(device)
    return found, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

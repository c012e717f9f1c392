"""Times and ratios of times that can be compared.

Contenders take turns within every round, so that what else the machine does, or how warm it is, meets all
of them alike; every round has an order of its own, so that nobody always comes after the same one. Ratios are
taken within a round, and their median is reported.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

# Seconds before a contender's turn. The threads of BLAS libraries keep looking for work for some 30 ms after
# their last product, and would share the cores with whoever comes next.
PAUSE = 0.05


def seconds(compute: Callable[[], object]) -> float:
    """What one call takes, with all that it sets going on a GPU."""
    _arrive()
    start = time.perf_counter()
    compute()
    _arrive()
    return time.perf_counter() - start


def _arrive() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    limit: float = math.inf,
    warm_up: Mapping[str, float] | None = None,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    Args:
        contenders: by name.
        rounds: how many count.
        limit: a contender whose warm-up takes longer than so many seconds is not run again: its warm-up
            counts instead.
        warm_up: seconds of a first round that was run already.
        prepare: what a contender of this name needs to be done before its turn, off the clock.
    """
    first = dict(warm_up or {})
    if not first:
        for name, compute in contenders.items():
            prepare(name)
            first[name] = seconds(compute)
    slow = {name for name in contenders if first[name] > limit}
    times: dict[str, list[float]] = {name: [first[name]] if name in slow else [] for name in contenders}
    order, shuffle = [name for name in contenders if name not in slow], random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            prepare(name)
            gc.collect()  # what others left behind
            time.sleep(PAUSE)
            gc.disable()  # looking through all that lives takes longer than a short solve
            try:
                times[name].append(seconds(contenders[name]))
            finally:
                gc.enable()
    return times


def ratios(times: list[float], reference: list[float]) -> list[float]:
    """The ratio within every round; who ran only once did so in every round."""
    rounds = max(len(times), len(reference))
    ours, theirs = (t * rounds if len(t) == 1 else t for t in (times, reference))
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def ratio(times: list[float], reference: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(ratios(times, reference))


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; NaN if there are none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles; 0 of a single time."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2


def with_spread(figures: Sequence[float]) -> str:
    """Median and spread in words, the median with three digits or more; no spread of a single figure."""
    median = statistics.median(figures)
    digits = max(0, 2 - math.floor(math.log10(abs(median)))) if median else 0
    shown = f"{median:,.{digits}f}"
    return shown if len(figures) < 2 else f"{shown} ± {spread(figures):,.{digits}f}"


def milliseconds(times: Sequence[float]) -> str:
    """Median and spread of seconds, in words; "-" where nothing was timed."""
    return with_spread([1e3 * time for time in times]) if times else "-"

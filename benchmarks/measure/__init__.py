"""What measures: clocks, memory, evaluations, profiles."""

from .cells import Watched, worst_residual
from .kernels import num_kernels
from .marks import marked, marked_both_ways
from .peak import peak_bytes, peak_rss
from .profiling import profiled
from .timing import geometric_mean, interleaved, milliseconds, ratio, ratios, seconds, spread, with_spread

__all__ = [
    "Watched",
    "geometric_mean",
    "interleaved",
    "marked",
    "marked_both_ways",
    "milliseconds",
    "num_kernels",
    "peak_bytes",
    "peak_rss",
    "profiled",
    "ratio",
    "ratios",
    "seconds",
    "spread",
    "with_spread",
    "worst_residual",
]

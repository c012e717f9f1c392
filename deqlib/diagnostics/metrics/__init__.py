"""What `diagnose` measures at the fixed point, one metric a file.

A metric is a function of an `Experiment` that returns a `MetricReport` of a class of its own, or `None` where
it was not asked for. To add one, write it in a new file here and list it below. Its numbers then show in the
table of a diagnosis, its notes among the notes, and its report is one of `Diagnosis.reports`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..experiment import Experiment
from ..reports import MetricReport
from .contraction import measure_contraction
from .coupling import measure_coupling
from .determinism import measure_determinism
from .gradients import measure_gradients
from .paths import measure_paths
from .spectrum import measure_spectrum

Metric = Callable[[Experiment], MetricReport | None]

# In the order in which they draw random numbers and tables show them.
METRICS: tuple[Metric, ...] = (
    measure_spectrum,
    measure_gradients,
    measure_contraction,
    measure_paths,
    measure_determinism,
    measure_coupling,
)

__all__ = ["METRICS", "Metric"]

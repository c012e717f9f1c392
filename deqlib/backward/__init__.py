"""Backward modes: how gradients pass through a solve.

| mode | computes | evaluations kept in memory | error |
| --- | --- | --- | --- |
| `Unroll` | gradient of the iteration | all | none, of the iteration |
| `Reversible` | gradient of the iteration | none | rounding of the iteration run backwards |
| `ImplicitDifferentiation` | gradient of the fixed point | 1 | the tolerances of the two solves |
| `SharedInverse` | adjoint by the forward solve's history | 1, and that history | falls with `refine` |
| `PhantomGradient` | truncated, damped series | `steps`, or 1 in Neumann form | O(‖βJ + (1-β)I‖^steps) |
| `JFB` | first term of the series, or a clipped step more | 1 | O(‖J‖), or O(‖J‖²) unclipped |
| `StochasticJFB` | unrolled gradient cut at a random depth | the steps with gradient | of the cut |
"""

from .base import Backward
from .implicit import AdjointStart, ImplicitDifferentiation
from .jfb import JFB
from .phantom import PhantomGradient
from .reversible import ReconstructionError, ReconstructionWarning, Reversible
from .shared_inverse import SharedInverse
from .stochastic import StochasticJFB
from .unroll import Unroll

__all__ = [
    "JFB",
    "AdjointStart",
    "Backward",
    "ImplicitDifferentiation",
    "PhantomGradient",
    "ReconstructionError",
    "ReconstructionWarning",
    "Reversible",
    "SharedInverse",
    "StochasticJFB",
    "Unroll",
]

"""Backward modes: how gradients pass through a solve.

| mode | computes | evaluations kept in memory | error |
| --- | --- | --- | --- |
| `Unroll` | gradient of the iteration | all | none, of the iteration |
| `ImplicitDifferentiation` | gradient of the fixed point | 1 | the tolerances of the two solves |
| `PhantomGradient` | truncated, damped series | `steps`, or 1 in Neumann form | O(‖βJ + (1-β)I‖^steps) |
| `JFB` | first term of the series | 1 | O(‖J‖) |
| `StochasticJFB` | unrolled gradient cut at a random depth | the steps with gradient | of the cut |
"""

from .base import Backward
from .implicit import ImplicitDifferentiation
from .jfb import JFB
from .phantom import PhantomGradient
from .stochastic import StochasticJFB
from .unroll import Unroll

__all__ = ["JFB", "Backward", "ImplicitDifferentiation", "PhantomGradient", "StochasticJFB", "Unroll"]

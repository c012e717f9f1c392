"""Implicit layers for PyTorch: a layer's output is the fixed point of a cell.

`ImplicitLayer` is the module, `fixed_point` the function. Solvers find the fixed point, backward modes
differentiate through it, `Stopping` says when it is good enough, `Solution` what was found.
"""

from .backward import (
    JFB,
    Backward,
    ImplicitDifferentiation,
    PhantomGradient,
    StochasticJFB,
    Unroll,
)
from .fixed_point import fixed_point
from .layer import ImplicitLayer
from .solution import NonConvergenceError, NonConvergenceWarning, OnFailure, Solution, Status
from .solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solver
from .stopping import Stopping

__version__ = "0.1.0"

__all__ = [
    "JFB",
    "Anderson",
    "Auto",
    "Backward",
    "Broyden",
    "ImplicitDifferentiation",
    "ImplicitLayer",
    "NewtonKrylov",
    "NonConvergenceError",
    "NonConvergenceWarning",
    "OnFailure",
    "PhantomGradient",
    "Picard",
    "Solution",
    "Solver",
    "Status",
    "StochasticJFB",
    "Stopping",
    "Unroll",
    "fixed_point",
]

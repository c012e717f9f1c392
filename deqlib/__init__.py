"""Implicit layers for PyTorch: a layer's output is the fixed point of a cell.

`ImplicitLayer` is the module, `fixed_point` the function. Solvers find the fixed point, backward modes
differentiate through it, `Stopping` says when it is good enough, `Solution` what was found.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import loops as loops
from . import nn as nn  # not in __all__: a star import must not hide torch.nn
from . import regularizers as regularizers
from .backward import (
    JFB,
    AdjointStart,
    Backward,
    ImplicitDifferentiation,
    PhantomGradient,
    ReconstructionError,
    ReconstructionWarning,
    Reversible,
    SharedInverse,
    StochasticJFB,
    Unroll,
)
from .depths import DepthDistribution, Geometric, LogNormalPoisson, Poisson, Uniform
from .fixed_point import fixed_point
from .layer import ImplicitLayer
from .loops import (
    EquilibriumCache,
    HaltingScore,
    KeyValueCache,
    OutputDifference,
    PredictionEntropy,
    PredictionKL,
    StableArgMax,
    StepCache,
    Stream,
    StreamReport,
    causal_mask,
    deep_supervision,
    solve_stream,
)
from .readout import Readout
from .recording import RecordedSolve, RecordedSolves, record
from .reporting import FailurePolicy
from .solution import NonConvergenceError, NonConvergenceWarning, OnFailure, Solution, Status
from .solvers import (
    GMRES,
    Anderson,
    Auto,
    Broyden,
    NewtonKrylov,
    Picard,
    ReversiblePicard,
    Solver,
)
from .steps import Step
from .stopping import Stopping

if TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from .diagnostics import Diagnosis, ablate, diagnose

__version__ = "0.2.0"

__all__ = [
    "GMRES",
    "JFB",
    "AdjointStart",
    "Anderson",
    "Auto",
    "Backward",
    "Broyden",
    "DepthDistribution",
    "Diagnosis",
    "EquilibriumCache",
    "FailurePolicy",
    "Geometric",
    "HaltingScore",
    "ImplicitDifferentiation",
    "ImplicitLayer",
    "KeyValueCache",
    "LogNormalPoisson",
    "NewtonKrylov",
    "NonConvergenceError",
    "NonConvergenceWarning",
    "OnFailure",
    "OutputDifference",
    "PhantomGradient",
    "Picard",
    "Poisson",
    "PredictionEntropy",
    "PredictionKL",
    "Readout",
    "ReconstructionError",
    "ReconstructionWarning",
    "RecordedSolve",
    "RecordedSolves",
    "Reversible",
    "ReversiblePicard",
    "SharedInverse",
    "Solution",
    "Solver",
    "StableArgMax",
    "Status",
    "Step",
    "StepCache",
    "StochasticJFB",
    "Stopping",
    "Stream",
    "StreamReport",
    "Uniform",
    "Unroll",
    "ablate",
    "causal_mask",
    "deep_supervision",
    "diagnose",
    "fixed_point",
    "record",
    "solve_stream",
]

# Imported when asked for: a program that trains or serves a layer need not wait for what looks into one.
_ON_DEMAND = ("Diagnosis", "ablate", "diagnose", "diagnostics")

if not TYPE_CHECKING:  # to a type checker a module with a `__getattr__` has every name

    def __getattr__(name: str) -> Any:
        if name not in _ON_DEMAND:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        diagnostics = import_module(".diagnostics", __name__)
        return diagnostics if name == "diagnostics" else getattr(diagnostics, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})

"""Implicit layers for PyTorch: a layer's output is the fixed point of a cell.

`ImplicitLayer` is the module, `fixed_point` the function. Solvers find the fixed point, backward modes
differentiate through it, `Stopping` says when it is good enough, `Solution` what was found.
"""

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
from .diagnostics import Diagnosis, ablate, diagnose
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

"""For those who loop a block: random depths, when to leave, caches, streams of samples, deep supervision."""

from ..depths import DepthDistribution, Geometric, LogNormalPoisson, Poisson, Uniform
from ..steps import Step
from .cache import EquilibriumCache, KeyValueCache, StepCache, causal_mask
from .readouts import HaltingScore, OutputDifference, PredictionEntropy, PredictionKL, StableArgMax
from .streaming import Stream, StreamReport, solve_stream
from .supervision import deep_supervision

__all__ = [
    "DepthDistribution",
    "EquilibriumCache",
    "Geometric",
    "HaltingScore",
    "KeyValueCache",
    "LogNormalPoisson",
    "OutputDifference",
    "Poisson",
    "PredictionEntropy",
    "PredictionKL",
    "StableArgMax",
    "Step",
    "StepCache",
    "Stream",
    "StreamReport",
    "Uniform",
    "causal_mask",
    "deep_supervision",
    "solve_stream",
]

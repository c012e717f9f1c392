"""For those who loop a block: random depths, when to leave, streams of samples, caches, supervision on the way."""

from ..depths import DepthDistribution, Geometric, LogNormalPoisson, Poisson, Uniform
from ..steps import Step
from .readouts import HaltingScore, OutputDifference, PredictionEntropy, PredictionKL, StableArgMax
from .streaming import Stream, StreamReport, solve_stream
from .supervision import deep_supervision

__all__ = [
    "DepthDistribution",
    "Geometric",
    "HaltingScore",
    "LogNormalPoisson",
    "OutputDifference",
    "Poisson",
    "PredictionEntropy",
    "PredictionKL",
    "StableArgMax",
    "Step",
    "Stream",
    "StreamReport",
    "Uniform",
    "deep_supervision",
    "solve_stream",
]

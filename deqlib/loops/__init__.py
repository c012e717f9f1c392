"""For those who loop a block: random depths, what a cell may know of its loop, and when to leave it."""

from ..depths import DepthDistribution, Geometric, LogNormalPoisson, Poisson, Uniform
from ..steps import Step
from .readouts import HaltingScore, OutputDifference, PredictionEntropy, PredictionKL, StableArgMax

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
    "Uniform",
]

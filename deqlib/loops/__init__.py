"""What looped models need around a solve: a block that is applied again and again, and when to leave it."""

from .readouts import HaltingScore, OutputDifference, PredictionEntropy, PredictionKL, StableArgMax

__all__ = [
    "HaltingScore",
    "OutputDifference",
    "PredictionEntropy",
    "PredictionKL",
    "StableArgMax",
]

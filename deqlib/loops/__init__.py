"""For those who loop a block: random depths, and what a looped cell may know of its loop."""

from ..depths import DepthDistribution, Geometric, LogNormalPoisson, Poisson, Uniform
from ..steps import Step

__all__ = [
    "DepthDistribution",
    "Geometric",
    "LogNormalPoisson",
    "Poisson",
    "Step",
    "Uniform",
]

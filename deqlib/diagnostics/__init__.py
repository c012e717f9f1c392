"""Measures of a layer.

`diagnose` looks at how a layer's solve and its gradients fare on given inputs; `saved_bytes` counts what
a forward pass keeps for the backward pass.
"""

from .measure import diagnose
from .memory import saved_bytes
from .report import Diagnosis, GradientReport, PathReport, SolveReport

__all__ = ["Diagnosis", "GradientReport", "PathReport", "SolveReport", "diagnose", "saved_bytes"]

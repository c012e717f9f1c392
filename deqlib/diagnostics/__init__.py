"""Measures of a layer.

`diagnose` looks at how a layer's solve and its gradients fare on given inputs; `saved_bytes` counts what
a forward pass keeps for the backward pass; `ablate` compares solvers and backward modes on a layer, in
evaluations, gradients, time and memory.
"""

from .ablate import Ablation, BackwardRow, SolverRow, ablate
from .measure import diagnose
from .memory import saved_bytes
from .report import Diagnosis, GradientReport, PathReport, SolveReport

__all__ = [
    "Ablation",
    "BackwardRow",
    "Diagnosis",
    "GradientReport",
    "PathReport",
    "SolveReport",
    "SolverRow",
    "ablate",
    "diagnose",
    "saved_bytes",
]

"""Measures of a layer.

`diagnose` looks at how a layer's solve and its gradients fare on given inputs; `saved_bytes` counts what
a forward pass keeps for the backward pass; `ablate` compares solvers and backward modes on a layer, in
evaluations, gradients, time and memory.

Each module stands on those before it. `memory`, `krylov` and `timing` count and measure. `subject` is a cell
at its inputs. `reports` are what is found of one solve, of one gradient, or by one metric; `gradients`,
`precision` and `metrics` find it, and `findings` holds all of it. `advice`, `tables` and `plots` read it.
`diagnosis` and `ablation` are what a user calls.
"""

from .ablation import Ablation, ablate
from .diagnosis import Diagnosis, diagnose
from .memory import saved_bytes
from .metrics.coupling import CouplingReport
from .metrics.paths import PathReport
from .precision import PrecisionReport
from .reports import GradientReport, SolveReport

# An `Ablation` is a table of the reports that a `Diagnosis` holds. What its rows were called stays valid.
SolverRow = SolveReport
BackwardRow = GradientReport

__all__ = [
    "Ablation",
    "BackwardRow",
    "CouplingReport",
    "Diagnosis",
    "GradientReport",
    "PathReport",
    "PrecisionReport",
    "SolveReport",
    "SolverRow",
    "ablate",
    "diagnose",
    "saved_bytes",
]

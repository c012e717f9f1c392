"""Solvers: rules that turn an iterate and its image into the next iterate."""

from .anderson import Anderson
from .auto import Auto
from .base import Solver
from .broyden import Broyden
from .newton_krylov import NewtonKrylov
from .picard import Picard

__all__ = ["Anderson", "Auto", "Broyden", "NewtonKrylov", "Picard", "Solver"]

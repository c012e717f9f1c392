"""Solvers: rules that turn an iterate and its image into the next iterate."""

from .anderson import Anderson
from .auto import Auto
from .base import Solver
from .broyden import Broyden
from .gmres import GMRES
from .newton_krylov import NewtonKrylov
from .picard import Picard
from .reversible import ReversiblePicard

__all__ = ["GMRES", "Anderson", "Auto", "Broyden", "NewtonKrylov", "Picard", "ReversiblePicard", "Solver"]

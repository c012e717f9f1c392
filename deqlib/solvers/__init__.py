"""Solvers: rules that turn an iterate and its image into the next iterate."""

from .anderson import Anderson
from .base import Solver
from .broyden import Broyden
from .picard import Picard

__all__ = ["Anderson", "Broyden", "Picard", "Solver"]

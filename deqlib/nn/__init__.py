"""Modules and parametrizations that keep a cell well-behaved.

They know what a solve is: what they draw or update, they draw or update once a solve, so that the cell is
one map from its first evaluation to the last product of the backward pass.
"""

from .._scope import checkpoint_contexts, one_solve
from .dropout import Dropout
from .injection import StableInjection
from .monotone import MonotoneCell
from .spectral_norm import remove_spectral_norm, spectral_norm

__all__ = [
    "Dropout",
    "MonotoneCell",
    "StableInjection",
    "checkpoint_contexts",
    "one_solve",
    "remove_spectral_norm",
    "spectral_norm",
]

"""What models that loop a block need beside the solve: a cache of keys and values while they decode."""

from .cache import EquilibriumCache, KeyValueCache, StepCache, causal_mask

__all__ = [
    "EquilibriumCache",
    "KeyValueCache",
    "StepCache",
    "causal_mask",
]

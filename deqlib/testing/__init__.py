"""Tools for testing solvers and implicit layers: problems with known answers.

`deqlib.testing.strategies` (needs hypothesis) draws problems and states at random;
`deqlib.testing.conformance` (needs pytest and hypothesis) is a test suite that a solver can inherit.
"""

from .problems import (
    Problem,
    convolution,
    drift,
    expanding,
    explosion,
    linear,
    mixed_difficulty,
    mixer,
    mlp,
    monotone,
    nearly_singular,
    suite,
    tanh_rnn,
    transformer,
    two_cycle,
)

__all__ = [
    "Problem",
    "convolution",
    "drift",
    "expanding",
    "explosion",
    "linear",
    "mixed_difficulty",
    "mixer",
    "mlp",
    "monotone",
    "nearly_singular",
    "suite",
    "tanh_rnn",
    "transformer",
    "two_cycle",
]

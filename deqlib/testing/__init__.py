"""Tools for testing solvers, cells and implicit layers: problems with known answers, and test suites.

`deqlib.testing.strategies` (needs hypothesis) draws problems and states at random. `SolverConformance`
(needs pytest and hypothesis) and `CellConformance` (needs pytest) are test suites that a solver and the
cell of a layer can inherit; what they need is imported when they are asked for, and the extra `testing`
brings it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .cell_laws import CellConformance as CellConformance
    from .solver_laws import SolverConformance as SolverConformance

_SUITES = {"CellConformance": "cell_laws", "SolverConformance": "solver_laws"}  # and where they are

# Without the test suites: a star import must not need pytest.
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


def __getattr__(name: str) -> Any:
    if name not in _SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_SUITES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"deqlib.testing.{name} needs the packages pytest and hypothesis ({error}); "
            "pip install 'deqlib[testing]'"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUITES])

"""The suites by name: a module or package each, whose `CASES` lists its cases."""

from __future__ import annotations

from types import ModuleType

from . import backward, batching, depth, recipes, scaling, solvers, viar

SUITES: dict[str, ModuleType] = {
    "solvers": solvers,
    "backward": backward,
    "depth": depth,
    "viar": viar,
    "recipes": recipes,
    "scaling": scaling,
    "batching": batching,
}

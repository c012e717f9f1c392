"""Who is compared: deqlib's solvers, torchdeq's and scipy's, each with the same budget of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from deqlib import Anderson, Auto, Broyden, NewtonKrylov, Picard, Stopping
from deqlib.testing import Problem

from ...baselines import scipy, torchdeq
from ...maps import solve
from ...show import COLORS

Contender = Callable[[Problem, float, int], Tensor]  # problem, rtol, evaluations allowed -> value

SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}
SCIPY_LARGEST = 2**18  # numbers of a batch; beyond, a solve of scipy's takes up to ten seconds
ROUNDING = 1.001  # what a residual may exceed its tolerance by when it is computed anew
ONCE = 2.0  # seconds; a solve that takes longer is timed once


def stopping(rtol: float, evaluations: int) -> Stopping:
    """deqlib's rule for at most so many evaluations."""
    return Stopping(rtol=rtol, max_steps=evaluations - 1, patience=50)


def _deqlibs(name: str, problem: Problem, rtol: float, evaluations: int) -> Tensor:
    value: Tensor = solve(problem, SOLVERS[name], stopping(rtol, evaluations)).value
    return value


CONTENDERS: dict[str, Contender] = {
    **{f"deqlib {name}": partial(_deqlibs, name) for name in SOLVERS},
    **{f"torchdeq {name}": partial(torchdeq.solve, name) for name in torchdeq.SOLVERS},
    **{f"scipy {name}": partial(scipy.solve, name) for name in scipy.SOLVERS},
}


def not_run(name: str, problem: Problem) -> str | None:
    """Why a contender is left out of a problem, if it is."""
    if name.startswith("torchdeq") and not torchdeq.is_installed():
        return "not run: torchdeq is not installed"
    if name.startswith("scipy") and problem.z0.is_cuda:
        return "not run: scipy computes on a CPU"
    numbers = problem.z0.numel()
    if name.startswith("scipy") and numbers > SCIPY_LARGEST:
        return f"not run: {numbers:,} numbers are more than {SCIPY_LARGEST:,}"
    return None


def style(name: str) -> dict[str, Any]:
    """How a contender is drawn: the colour is that of its method, the dashes those of its library."""
    library, method = name.split()
    dashes = {"deqlib": "-", "torchdeq": "--", "scipy": ":"}
    return {"color": COLORS[list(SOLVERS).index(method)], "linestyle": dashes[library], "label": name}


def head(row: dict[str, Any]) -> str:
    """Of the column of a contender in a table: a name that can be broken."""
    name: str = row["contender"]
    return name.replace("NewtonKrylov", "Newton Krylov")

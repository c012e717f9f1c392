"""torchdeq 0.1: its solvers, and its layers. Where it is not installed they raise when they are called."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from torch import Tensor

from deqlib.testing import Problem

with warnings.catch_warnings():
    # Its docstrings hold invalid escapes, of which Python tells when it compiles them.
    for category in (DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", "invalid escape sequence", category)
    with contextlib.suppress(ModuleNotFoundError):
        import torchdeq

# By deqlib's names: module and function of `torchdeq.solver`, and by how much its `max_iter` is less than the
# evaluations.
SOLVERS: dict[str, tuple[str, str, int]] = {
    "Picard": ("fp_iter", "fixed_point_iter", 0),
    "Anderson": ("anderson", "anderson_solver", 0),
    "Broyden": ("broyden", "broyden_solver", 1),
}


def is_installed() -> bool:
    """Whether there is anything to measure."""
    return "torchdeq" in globals()


def _library() -> Any:
    if not is_installed():
        raise ModuleNotFoundError("torchdeq is not installed: `pip install torchdeq==0.1.0`")
    return torchdeq


def solve(name: str, problem: Problem, rtol: float, evaluations: int, **settings: Any) -> Tensor:
    """The last iterate of a solver, a name of `SOLVERS`, that may evaluate so often, with its settings."""
    module, function, uncounted = SOLVERS[name]
    solver = getattr(getattr(_library().solver, module), function)
    value: Tensor = solver(
        problem.f, problem.z0, max_iter=evaluations - uncounted, tol=rtol, stop_mode="rel", **settings
    )[0]
    return value


def layer(settings: dict[str, Any], problem: Problem) -> Tensor:
    """The fixed point carrying gradient, of a layer with these settings; tolerances are relative."""
    deq = _library().get_deq(f_stop_mode="rel", b_stop_mode="rel", **settings)
    values, _ = deq(problem.f, problem.z0)
    value: Tensor = values[-1]
    return value

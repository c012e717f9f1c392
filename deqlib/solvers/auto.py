"""Several methods in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._checks import check_instance, check_integer
from .anderson import Anderson
from .base import Solver
from .broyden import Broyden
from .newton_krylov import NewtonKrylov


def _default_methods() -> tuple[Solver, ...]:
    return (Anderson(), Broyden(memory=50), NewtonKrylov())


@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """Several methods in turn: a sample that one gives up goes on with the next from its best iterate.

    A method gives up a sample that stalls or diverges by the stopping rule, or whose best residual did not
    improve for `patience` steps. Samples that the first method solves never see another, so on easy
    problems `Auto` is `Anderson`, evaluation for evaluation. `Solution.method` says who finished which
    sample. Histories are handed on too, where the next method can use them. Samples change hands when the
    host looks (`Stopping.check_every`). With a fixed number of steps nothing is measured, so the first
    method takes them all.

    Args:
        methods: in order; the default is Anderson, then Broyden with a larger memory, then Newton-Krylov.
        patience: steps without a better residual after which a method gives up, the last one excepted:
            there `Stopping.patience` decides.
        rounds: how often to go through the methods.
    """

    methods: tuple[Solver, ...] = field(default_factory=_default_methods)
    patience: int = 20
    rounds: int = 2

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.methods, tuple) or not self.methods:
            raise TypeError(f"Auto: methods must be a tuple of at least one solver, got {self.methods!r}")
        for i, method in enumerate(self.methods):
            hint = "a single method such as deqlib.Anderson()"
            check_instance("Auto", Solver, hint, **{f"methods[{i}]": method})
            if len(method.stages) > 1:
                raise TypeError(f"Auto: methods[{i}] must be {hint}, got {method!r}")
        check_integer("Auto", 1, patience=self.patience, rounds=self.rounds)

    def init(self, z0: Tensor) -> Any:
        """State of the first method."""
        return self.methods[0].init(z0)

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        """A step of the first method."""
        return self.methods[0].step(z, fz, state)

    def resume(self, state: Any, z0: Tensor) -> Any:
        """As the first method."""
        return self.methods[0].resume(state, z0)

    def gives_up(self, since: Tensor) -> Tensor:
        """After `patience` steps without progress."""
        return since >= self.patience

    @property
    def stages(self) -> tuple[Solver, ...]:
        """The methods, `rounds` times."""
        return self.methods * self.rounds

"""Flags that every command that samples has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..generation.settings import Sampling
from ..model.config import check_at_least
from ..model.schedule import Adaptive, Budget, Iterations

no_prefix = tyro.conf.arg(name="")  # --cfg, not --sampling.cfg


def given_flags() -> set[str]:
    """Names of the flags on the command line, as in Python: "model.num_classes" for --model.num-classes.

    A default that a recipe fills in, and the same value given by the user, are two things: the one may be
    fitted to what is found, the other may not.
    """
    flags = (argument[2:].split("=")[0] for argument in sys.argv[1:] if argument.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def check_not_empty(**values: Sequence[Any]) -> None:
    """Raise `ValueError` naming the first flag that is given with no value behind it."""
    given = given_flags()
    for name, value in values.items():
        if name in given and not value:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected at least one value, got none; or leave it"
            )


@dataclass(frozen=True, kw_only=True)
class ExecutionFlags:
    """What the work is done with; it decides time and memory."""

    batch_size: int = 100  # images generated at a time; changes memory, not the images (but see --num)
    device: str = "auto"  # cpu, cuda, or cuda:1; auto is cuda where there is one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the blocks' weights; default as saved
    compile: bool = False  # compile the blocks: minutes at the first batch, for many on a GPU
    graphs: bool = False  # replay CUDA graphs: the first batch takes three times as long; for many on a GPU

    def __post_init__(self) -> None:
        """Validate."""
        check_at_least("ExecutionFlags", 1, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class _Settings(Sampling):
    __doc__ = Sampling.__doc__

    iterations: Annotated[Iterations | None, tyro.conf.Suppress] = None  # there are three flags for it


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How to sample.

    The fields stand in the order of the help. `settings` are the sampler's without the iterations, for which
    there are three flags.
    """

    iterations: tuple[int, ...] = ()  # one for all scales, two for first and last, or one a scale
    adaptive: float | None = None  # instead: iterate until the relative residual is below this
    budget: int | None = None  # instead: evaluations in all, falling from the first scale to the last
    settings: Annotated[_Settings, no_prefix] = field(default_factory=_Settings)
    execution: Annotated[ExecutionFlags, no_prefix] = ExecutionFlags()

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampler, iterations included.

        Raises:
            ValueError: two flags that exclude each other, or `--iterations` without a number.
        """
        check_not_empty(iterations=self.iterations)
        return Sampling(**{**vars(self.settings), "iterations": self._iterations()})

    def _iterations(self) -> Iterations | None:
        given = (bool(self.iterations), self.adaptive is not None, self.budget is not None)
        if sum(given) > 1:
            raise ValueError("--iterations, --adaptive and --budget exclude each other; give one of them")
        if self.adaptive is not None:
            return Adaptive(rtol=self.adaptive)
        if self.budget is not None:
            return Budget(evaluations=self.budget)
        if not self.iterations:
            return None
        if len(self.iterations) == 1:
            return self.iterations[0]
        return self.iterations if len(self.iterations) == 2 else list(self.iterations)


@dataclass(frozen=True, kw_only=True)
class _EagerExecution(ExecutionFlags):
    __doc__ = ExecutionFlags.__doc__

    graphs: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False  # a replay could not be changed on its way


@dataclass(frozen=True, kw_only=True)
class EditingFlags(SamplingFlags):
    """How to sample, where every scale is changed on its way."""

    execution: Annotated[_EagerExecution, no_prefix] = _EagerExecution()


Flags = Annotated[SamplingFlags, no_prefix]
FlagsOfEditing = Annotated[EditingFlags, no_prefix]
DEFAULTS = SamplingFlags()
DEFAULTS_OF_EDITING = EditingFlags()

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
optional = tyro.conf.arg(help_behavior_hint="(optional)")  # in the help, in place of "(default: None)"


def without(text: str) -> Any:
    """For a flag whose `None` or `()` stands for something: what the help says of it.

    Args:
        text: what happens without the flag.
    """
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


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


Dtype = Annotated[Literal["float32", "bfloat16", "float16"] | None, without("as saved")]
PartOfPair = Annotated[
    str | None, without("the one that comes with the package")
]  # of --model and --tokenizer


@dataclass(frozen=True, kw_only=True)
class ExecutionFlags:
    """What the work is done with; it decides time and memory."""

    batch_size: int = 100  # images generated at a time; changes memory, not the images (but see --num)
    device: str = "auto"  # cpu, cuda, or cuda:1; auto is cuda where there is one
    dtype: Dtype = None  # of the blocks' weights
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

    # one for all scales, two for first and last, or one a scale
    iterations: Annotated[tuple[int, ...], without("as the model says")] = ()
    # instead: iterate until the relative residual is below this
    adaptive: Annotated[float | None, optional] = None
    # instead: evaluations in all, falling from the first scale to the last
    budget: Annotated[int | None, optional] = None
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


@dataclass(frozen=True, kw_only=True)
class _SettingsOfSamples(_Settings):
    __doc__ = Sampling.__doc__

    # mixtures of codes are no samples of the model, so metrics are not for them
    more_smooth: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False


@dataclass(frozen=True, kw_only=True)
class MeasuringFlags(SamplingFlags):
    """How to sample what is measured."""

    settings: Annotated[_SettingsOfSamples, no_prefix] = field(default_factory=_SettingsOfSamples)


@dataclass(frozen=True, kw_only=True)
class _PublishedSettings(_SettingsOfSamples):
    __doc__ = Sampling.__doc__

    cache: Annotated[Literal["equilibrium", "iterate"], without("iterate; of a VAR equilibrium")] = (
        "equilibrium"
    )


@dataclass(frozen=True, kw_only=True)
class PublishedFlags(MeasuringFlags):
    """How to sample as published, where a flag does not say otherwise."""

    # one for all scales, two for first and last, or one a scale
    iterations: Annotated[tuple[int, ...], without("10; a VAR has none")] = ()
    settings: Annotated[_PublishedSettings, no_prefix] = field(default_factory=_PublishedSettings)


Flags = Annotated[SamplingFlags, no_prefix]
FlagsOfEditing = Annotated[EditingFlags, no_prefix]
FlagsOfMeasuring = Annotated[MeasuringFlags, no_prefix]
FlagsAsPublished = Annotated[PublishedFlags, no_prefix]
DEFAULTS = SamplingFlags()
DEFAULTS_OF_EDITING = EditingFlags()
DEFAULTS_OF_MEASURING = MeasuringFlags()
DEFAULTS_AS_PUBLISHED = PublishedFlags()

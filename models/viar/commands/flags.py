"""Flags that every command that samples has."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from ..generation.settings import Sampling
from ..model.schedule import Adaptive, Budget, Iterations

no_prefix = tyro.conf.arg(name="")  # --cfg, not --sampling.cfg


@dataclass(frozen=True, kw_only=True)
class ExecutionFlags:
    """What the work is done with; it decides time and memory."""

    batch_size: int = 100  # images generated at a time; changes memory, not the images (but see --num)
    device: str = "auto"  # cpu, cuda, or cuda:1; auto is cuda where there is one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the blocks' weights; default as saved
    compile: bool = False  # compile the blocks: minutes at the first batch, for many on a GPU


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How to sample.

    The fields stand in the order of the help. `settings` are the sampler's without the iterations, for which
    there are three flags.
    """

    iterations: tuple[int, ...] = ()  # one for all scales, two for first and last, or one a scale
    adaptive: float | None = None  # instead: iterate until the relative residual is below this
    budget: int | None = None  # instead: evaluations in all, falling from the first scale to the last
    settings: Annotated[Sampling, no_prefix] = field(default_factory=Sampling)
    execution: Annotated[ExecutionFlags, no_prefix] = ExecutionFlags()

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampler, iterations included.

        Raises:
            ValueError: two flags that exclude each other.
        """
        return replace(self.settings, iterations=self._iterations())

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


Flags = Annotated[SamplingFlags, no_prefix]
DEFAULTS = SamplingFlags()

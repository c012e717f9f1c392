"""What a training takes, found out before it begins: two steps on made-up data, and nothing is kept."""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset

from ..data import Batch
from ..model.config import ImplicitTrunkConfig, TokenizerConfig, TransformerConfig
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .loop import check_device

LONGEST = 120.0  # seconds that two steps of a whole batch may take on a CPU
NUM_IMAGES = 1 << 20  # made-up ones: more than a batch
SMALL = 0.01  # share of the parameters below which a part is one of the others

Build = Callable[[], nn.Module]
Make = Callable[[int], Batch]  # so many images (B, 3, H, W) or rows of tokens (B, L), with labels (B,)
# Trains a model on data in a folder, as the command does.
Train = Callable[[nn.Module, Dataset[Batch], Path, TrainConfig], object]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What is known of a training before it begins.

    Attributes:
        config: settings of the run.
        parameters: of each part of the model.
        fixed_bytes: what every process holds all the time.
        device: type of the device.
        num_processes: that train together.
        measured: images of a step that was measured; 0 where none was.
        seconds: of a step that was measured.
        peak_bytes: in use at most: by PyTorch on a GPU, on a CPU by this process in all.
        why_not: why no step was measured, or none of a whole batch.
    """

    config: TrainConfig
    parameters: dict[str, int]
    fixed_bytes: dict[str, int]
    device: str
    num_processes: int
    measured: int = 0
    seconds: float = math.nan
    peak_bytes: int = 0
    why_not: str = ""

    def lines(self) -> list[str]:
        """All of it for people to read."""
        parts = ", ".join(f"{name} {_count(count)}" for name, count in self.parameters.items())
        fixed = ", ".join(f"{name} {_bytes(count)}" for name, count in self.fixed_bytes.items())
        lines = [
            f"parameters: {_count(sum(self.parameters.values()))} ({parts})",
            f"memory all the time: {_bytes(sum(self.fixed_bytes.values()))} ({fixed})",
        ]
        if not self.measured:
            return [*lines, f"no step was taken: {self.why_not}"]
        batch_size, steps, seconds = self.config.batch_size, self.config.steps, self.config.seconds
        step = self.seconds * batch_size / self.measured
        run = min(step * steps if steps else math.inf, seconds or math.inf)
        by = "this process in all" if self.device == "cpu" else "PyTorch on this process's GPU"
        where = f"{self.num_processes} process{'es' * (self.num_processes > 1)} on {self.device}"
        if self.why_not:
            lines.append(self.why_not)
            where += f", {batch_size / self.measured:g} times as long as measured"
        return [
            *lines,
            f"memory at the peak of a step of {_images(self.measured)}: {_bytes(self.peak_bytes)} ({by})",
            f"time of a step of {_images(batch_size)}: {_duration(step)} ({where})",
            f"time of the run: {_duration(run)}" + (f" (at most {steps:,} steps)" if steps else ""),
        ]


def two_steps(builds: Sequence[Build], train: Train, make: Make, config: TrainConfig) -> DryRun:
    """Two steps of each of some models, by the very loop that trains.

    On a CPU, where a batch would take minutes, steps are of one image for each process.

    Args:
        builds: makers of the model. The last one's second step is timed; memory is the most of all.
        train: the training.
        make: its data.
        config: its settings.
    """
    why_not = _refused(config)
    state = PartialState()  # as `check_device` made it
    with torch.device("meta"):
        model = builds[0]()
    told = DryRun(
        config=config,
        parameters=_parts(model),
        fixed_bytes=_fixed_bytes(model, config, state.num_processes),
        device=state.device.type,
        num_processes=state.num_processes,
    )
    free = torch.cuda.mem_get_info()[0] if told.device == "cuda" else psutil.virtual_memory().available
    if not why_not and sum(told.fixed_bytes.values()) > free:
        why_not = f"{_bytes(free)} are free here"
    if why_not:
        return replace(told, why_not=why_not)
    if state.device.type == "cpu":
        alone = replace(config, batch_size=state.num_processes, accumulate=1)
        seconds, _ = _take(builds[-1], train, make, alone)
        longest = 2 * seconds * config.batch_size / state.num_processes
        if longest > LONGEST:
            why_not = f"two steps of {_images(config.batch_size)} would take {_duration(longest)} here"
            config = alone
    taken = [_take(build, train, make, config) for build in builds]
    peak = max(peak for _, peak in taken)
    return replace(told, measured=config.batch_size, seconds=taken[-1][0], peak_bytes=peak, why_not=why_not)


def deepest_and_mean(config: TransformerConfig) -> list[TransformerConfig]:
    """Settings whose every step takes the most memory that one can take, and the mean time.

    Args:
        config: of any trunk; steps of an explicit one are all alike.
    """
    trunk = config.trunk
    if not isinstance(trunk, ImplicitTrunkConfig):
        return [config]
    mean = trunk.with_depth(*(math.ceil(sum(pair) / 2) for pair in (trunk.no_grad, trunk.grad)))
    return [replace(config, trunk=trunk.deepest), replace(config, trunk=mean)]


def made_up_tokenizer(config: TransformerConfig) -> Tokenizer:
    """Of random weights, with a transformer's scales and codes and next to no encoder."""
    least = TokenizerConfig(
        sides=config.sides,
        codebook_size=config.codebook_size,
        code_channels=config.code_channels,
        base_channels=1,
        multipliers=(1,),
        num_residual_blocks=1,
        num_groups=1,
    )
    return Tokenizer(least).eval()


def random_images(side: int) -> Make:
    """Maker of images (B, 3, side, side) in [-1, 1], all of one class."""
    return lambda count: (torch.rand(count, 3, side, side) * 2 - 1, torch.zeros(count, dtype=torch.int64))


def random_tokens(config: TransformerConfig) -> Make:
    """Maker of rows of tokens (B, L) of any class."""
    length = sum(side * side for side in config.sides)
    return lambda count: (
        torch.randint(config.codebook_size, (count, length)),
        torch.randint(config.num_classes, (count,)),
    )


class _Enough(Exception):
    """All steps were taken."""


class _MadeUp(Dataset[Batch]):
    """Data that notes when a batch is asked for, and ends the run after some of them."""

    at_random = False  # asked for whole batches, see `rows_of`

    def __init__(self, make: Make, num_batches: int) -> None:
        self.make, self.num_batches = make, num_batches
        self.asked = list[float]()  # seconds

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch as large."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.asked.append(time.monotonic())
        if len(self.asked) > self.num_batches:
            raise _Enough
        return self.make(len(indices))


def _take(build: Build, train: Train, make: Make, config: TrainConfig) -> tuple[float, int]:
    """Seconds of the second step, the first of which warms up, and bytes in use at most."""
    gc.collect()  # the model before
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    data = _MadeUp(make, 2 * config.accumulate)
    config = replace(
        config,
        steps=3,  # the third is not taken
        seconds=None,
        workers=0,
        sample_every=0,
        validate_every=0,
        patience=0,
        save_every=math.inf,
        trackers=(),
    )
    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        train(build(), data, Path(folder), config)
    return data.asked[-1] - data.asked[-1 - config.accumulate], _peak_bytes()


def _refused(config: TrainConfig) -> str:
    """Why the device cannot do what is asked for; empty where it can."""
    try:
        check_device(config)
    except ValueError as error:
        return str(error).removeprefix("TrainConfig: ")
    return ""


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _parts(model: nn.Module) -> dict[str, int]:
    """Parameters of each part, the largest first."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        part = ".".join(path[: 2 if path[0] == "trunk" else 1])
        counts[part] = counts.get(part, 0) + parameter.numel()
    total = sum(counts.values())
    large = {name: count for name, count in counts.items() if count >= SMALL * total}
    parts = dict(sorted(large.items(), key=lambda item: -item[1]))
    return {**parts, "others": total - sum(parts.values())}


def _fixed_bytes(model: nn.Module, config: TrainConfig, num_processes: int) -> dict[str, int]:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if config.sharding == "full":
        weights //= num_processes
    always = {"weights": weights, "gradients": weights, "two moments": 2 * weights}
    return {**always, "averaged weights": weights} if config.ema else always


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _count(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    """In its two largest units."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // (24 * 60)
    if days:
        return f"{days:,} d {hours - 24 * days} h"
    return f"{hours} h {minutes - 60 * hours} min" if hours else f"{minutes} min"

"""Settings of a training run, with the defaults of VIAR (arXiv 2605.01220)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kinds import check_fields
from ..model.config import check_at_least, check_fraction
from ..seeds import LARGEST_SEED

PRECISIONS = ("no", "bf16", "fp16")
SHARDINGS = ("none", "full")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run; the defaults are those published for the transformer.

    A run ends after `steps` steps or `seconds` of training, whichever comes first; the schedules follow
    whichever is nearer its end.

    Raises:
        ValueError: neither `steps` nor `seconds` is given, or a setting is out of range.
    """

    steps: int | None = None  # of the optimiser, after which the run ends
    seconds: float | None = None  # of training, after which the run ends
    batch_size: int = 512  # images a step, of all processes together
    lr: float = 1.6e-4  # highest learning rate; published: 8e-5 per 256 images of a batch (VAR: 1e-4)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW's two moments
    weight_decay: tuple[float, float] = (0.05, 0.08)  # at the first step and at the last
    clip: float = 2.0  # largest gradient norm
    accumulate: int = 1  # parts that a batch is worked off in, one after another
    mixed_precision: str = "no"  # "no", "bf16" or "fp16"
    # "none": each process has the whole model. "full": each has a share of weights, gradients and moments, so
    # that they need less memory together (FSDP2); for the transformer. One process has all of them anyway.
    sharding: str = "none"
    # Blocks of a transformer are evaluated again in the backward pass: less memory, more time, same losses
    checkpoint_activations: bool = False
    workers: int = 0  # processes that read pictures
    save_every: float = 300.0  # seconds between states to resume from
    sample_every: int = 1000  # steps between two pictures of how the run is doing, in samples/; 0 for none
    validate_every: int = 1000  # steps between two measurements of held-out data, if there is any; 0 for none
    patience: int = 0  # measurements without a new least loss after which the run ends; 0 for never
    ema: float = 0.0  # decay of the average of the weights that is measured, drawn and saved; 0 for none
    max_skipped: int = 50  # steps in a row with a loss or gradient that is not finite, at which the run ends
    compile: bool = False  # the model's blocks, by `torch.compile`
    # Who is told the numbers: "tensorboard", where it is installed, and "wandb", which must be
    trackers: tuple[str, ...] = ("tensorboard",)
    seed: int = 0  # of weights, batches and random depth

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        if self.steps is None and self.seconds is None:
            raise ValueError("TrainConfig: give steps or seconds, so that the run has an end")
        counts: tuple[tuple[int, tuple[str, ...]], ...] = (
            (1, ("batch_size", "accumulate", "max_skipped")),
            (0, ("workers", "sample_every", "validate_every", "patience", "seed")),
        )
        for least, names in counts:
            check_at_least("TrainConfig", least, **{name: getattr(self, name) for name in names})
        if self.seed > LARGEST_SEED:
            raise ValueError(f"TrainConfig: seed must be at most {LARGEST_SEED}, got {self.seed}")
        check_fraction("TrainConfig", ema=self.ema)
        for name in ("steps", "seconds", "lr", "clip", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainConfig: {name} must be positive, got {value}")
            if value == math.inf and name in ("seconds", "lr"):
                raise ValueError(f"TrainConfig: {name} must be finite, got {value}")
        for name, low, high in (("betas", 0.0, 1.0), ("weight_decay", 0.0, math.inf)):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(low <= value < high for value in pair):
                raise ValueError(
                    f"TrainConfig: {name} must be two numbers in [{low:g}, {high:g}), got {pair}"
                )
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"TrainConfig: mixed_precision must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}"
            )

        if self.sharding not in SHARDINGS:
            raise ValueError(f"TrainConfig: sharding must be 'none' or 'full', got {self.sharding!r}")
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise ValueError(f"TrainConfig: trackers must be out of {TRACKERS}, got {unknown}")

    def progress(self, step: int, seconds: float) -> float:
        """How far the run is after `step` steps and `seconds` of training, 0 to 1."""
        parts = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(max(parts), 1.0)

    def part_size(self, num_processes: int) -> int:
        """Images that all processes together see in one of the `accumulate` parts of a batch.

        Args:
            num_processes: that train together.

        Raises:
            ValueError: the batch does not divide into parts and among processes.
        """
        if self.batch_size % (self.accumulate * num_processes):
            raise ValueError(
                f"TrainConfig: batch_size={self.batch_size} must divide among accumulate={self.accumulate} "
                f"parts and {num_processes} processes"
            )
        return self.batch_size // self.accumulate

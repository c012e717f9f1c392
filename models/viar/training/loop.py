"""The training loop: prepare, then step, log and save until the run is done.

A run lives in one folder: `run.json` with what it was started with, `metrics.jsonl` and `samples/` as it
goes, `state/` to resume from if it is interrupted, `config.json` and `model.safetensors` (readable by
`from_pretrained`) when it is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import is_bf16_available, parse_flag_from_env, set_seed
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data import BatchedDataset, EndlessBatches, rows_of
from ..seeds import seed_at
from .checkpoint import Checkpoint
from .config import TrainConfig
from .log import RunLog
from .losses import StepLoss
from .optim import build_optimizer, set_progress
from .samples import Draw, RunSamples
from .settings import compare_settings, keep_settings

LOG_EVERY = 10  # steps; the first one is logged too


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    data: BatchedDataset[Any],
    folder: Path,
    config: TrainConfig,
    *,
    settings: Mapping[str, Any],
    draw: Draw | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train `model` in place and save it to `folder`; goes on with a run that was interrupted there.

    Args:
        model: tokenizer or transformer: a module with `save_pretrained`.
        step_loss: called with the model as prepared for training.
        data: what to train on.
        folder: of the run; made if it is not there.
        config: settings.
        settings: of `run_settings`, kept as run.json; its kind is shown beside the progress bar.
        draw: pictures of how the run is doing, every `config.sample_every` steps, in the main process alone;
            default none. They change nothing of the run.
        console: where that is shown; default standard output.

    Returns:
        The last logged metrics, with steps and seconds.

    Raises:
        ValueError: the batch does not divide into parts and among processes; an interrupted run in `folder`
            was started with other settings, or its state is damaged.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    for line in compare_settings(folder, settings):
        (console or Console()).print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = _accelerator(config)
    optimizer = build_optimizer(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay[0])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    checkpoint = Checkpoint(accelerator, folder / "state", every=config.save_every)
    state, is_main = checkpoint.restore(), accelerator.is_main_process
    if is_main:
        keep_settings(folder, settings)
    log = RunLog(folder / "metrics.jsonl", settings["kind"], state.step, is_main=is_main, console=console)
    together = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    samples = RunSamples(folder / "samples", draw if is_main else None, config.sample_every, state.step)
    batches = _batches(data, config, accelerator, state.step)
    wrapped.train()
    numbers: dict[str, float | Tensor] = {"loss": 0.0}  # of the last step
    metrics: dict[str, float] = {}  # of the last step that was logged
    with log.bar:
        while True:
            progress = config.progress(state.step, state.seconds)
            progress, save_is_due = _agreed(together, progress, checkpoint.is_due())
            if progress >= 1 or save_is_due:
                _check_finite(float(numbers["loss"]), state.step)
            if progress >= 1:
                break
            if save_is_due:
                checkpoint.save()
            start = time.monotonic()
            set_progress(optimizer, progress, lr=config.lr, weight_decay=config.weight_decay)
            numbers = _step(accelerator, wrapped, optimizer, step_loss, batches, state.step, config)
            state.step += 1
            state.seconds += time.monotonic() - start
            if state.step % LOG_EVERY == 0 or state.step == 1:
                metrics = {key: float(value) for key, value in numbers.items()}
                _check_finite(metrics["loss"], state.step)
                log.write(state.step, progress, metrics)
            samples.look(accelerator.unwrap_model(wrapped), state.step)
        log.finish(state.step)
    if is_main:
        accelerator.unwrap_model(wrapped).save_pretrained(folder)
        checkpoint.remove()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    if together is not None:
        dist.destroy_process_group(together)
    return metrics | {"steps": state.step, "seconds": round(state.seconds, 2)}


def check_device(config: TrainConfig) -> None:
    """Raise `ValueError` unless the device that a run would get, and its processes, can do what is asked for.

    Args:
        config: settings of the run.
    """
    # As an Accelerator makes it: the first one made decides whether processes know of one another.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    config.part_size(state.num_processes)
    if config.mixed_precision == "fp16" and state.device.type == "cpu":
        raise ValueError(
            "TrainConfig: mixed_precision='fp16' needs a GPU, and there is none: on a CPU all would run in "
            "float32; use mixed_precision='no' or 'bf16'"
        )
    if config.mixed_precision == "bf16" and not is_bf16_available(True):
        raise ValueError(
            f"TrainConfig: mixed_precision='bf16' is not supported by this device ({state.device}); use 'no' "
            "or 'fp16'"
        )


def _step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    step_loss: StepLoss,
    batches: Iterator[list[Tensor]],
    step: int,
    config: TrainConfig,
) -> dict[str, float | Tensor]:
    """Move the weights by the gradient of one batch; the loss of its last part, and what else is logged."""
    for _ in range(config.accumulate):
        batch = next(batches)
        with accelerator.accumulate(wrapped), accelerator.autocast():
            loss, numbers = step_loss(wrapped, batch, step)
        accelerator.backward(loss)
    accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **numbers}


def _accelerator(config: TrainConfig) -> Accelerator:
    # What is left of a run before would refuse another precision in the same process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulate
    )
    set_seed(config.seed, device_specific=True)
    return accelerator


def _batches(
    data: BatchedDataset[Any], config: TrainConfig, accelerator: Accelerator, first_step: int
) -> Iterator[list[Tensor]]:
    """This process's part of every batch from `first_step` on, on the device; a step takes `accumulate`."""
    loader = DataLoader(
        _ErrorsAsSamples(data, config.seed),
        batch_sampler=EndlessBatches(
            len(data),
            config.part_size(accelerator.num_processes),
            seed=config.seed,
            start=first_step * config.accumulate,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            rows=True,
        ),
        num_workers=config.workers,
        # One of its own: it seeds the workers, and must not move the generator that was just restored.
        generator=torch.Generator().manual_seed(seed_at(config.seed, first_step)),
        collate_fn=_already_collated,
        pin_memory=accelerator.device.type == "cuda",
    )
    return ([part.to(accelerator.device, non_blocking=True) for part in _whole(batch)] for batch in loader)


class _ErrorsAsSamples(Dataset[Any]):
    """Gives an error in place of a batch: one raised in a worker would bring the traceback in its text."""

    def __init__(self, data: BatchedDataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitems__(self, rows: list[int]) -> Any:
        try:
            return rows_of(self.data, rows, self.seed)
        except (ValueError, OSError) as error:
            return error


def _whole(batch: Any) -> Any:
    if isinstance(batch, Exception):
        raise batch
    return batch


def _already_collated(batch: Any) -> Any:
    return batch


def _agreed(together: dist.ProcessGroup | None, progress: float, save_is_due: bool) -> tuple[float, bool]:
    """What the main process's clock says: others would end the run or save at another step.

    From host to host: what a device is told is read from it only after all else that it was asked to do.
    """
    if together is None:
        return progress, save_is_due
    told = torch.tensor([progress, save_is_due], dtype=torch.float64)
    dist.broadcast(told, src=0, group=together)
    progress, save_is_due = told.tolist()
    return progress, bool(save_is_due)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training: the loss is {loss} at step {step}; lower lr, or use mixed_precision='bf16' or 'no'"
        )

"""The training loop: prepare, then step, log, measure and save until the run is done.

A run lives in one folder: `run.json` with what it was started with, `metrics.jsonl`, `curve.png`, `samples/`
and `best/` as it goes, `state/` to resume from if it is interrupted, `config.json` and `model.safetensors`
(readable by `from_pretrained`) when it is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    broadcast_object_list,
    get_int_from_env,
    is_bf16_available,
    parse_flag_from_env,
    reduce,
    set_seed,
)
from rich.console import Console
from torch import Tensor, nn

from ..data import BatchedDataset, EndlessBatches
from ..determinism import is_deterministic
from ..files import held
from ..kinds import checked
from ..launch import check_launch
from ..seeds import seed_at
from .asked import Asked, asked_to_end
from .checkpoint import Checkpoint
from .config import TrainConfig
from .critic import Critic
from .curve import draw_curve
from .ema import AveragedWeights
from .guard import StepGuard, poisoned
from .held_out import BestWeights, HeldOut, measured
from .loading import load_batches
from .log import RunLog, is_logged, read_metrics
from .losses import StepLoss
from .optim import build_optimizer, set_progress
from .processes import from_main, gathered
from .samples import Draw, RunSamples, undisturbed
from .settings import compare_settings, keep_settings
from .sharding import prepared, resting, whole
from .trackers import check_trackers, start_trackers

SCALE_HALVINGS = 16  # of float16's gradient scale, which starts at 2 ** 16 and may have to go down to 1


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    data: BatchedDataset[Any],
    folder: Path,
    config: TrainConfig,
    *,
    settings: Mapping[str, Any],
    critic: Critic | None = None,
    held_out: HeldOut | None = None,
    draw: Draw | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train `model` in place and save it to `folder`; goes on with a run that was interrupted there.

    Where held-out data is measured the model ends with the weights that did best on it; else with the average
    of its weights if `config.ema` asks for one, or with the last ones.

    Args:
        model: tokenizer or transformer: a module with `save_pretrained`.
        step_loss: called with the model as prepared for training.
        data: what to train on.
        folder: of the run; made if it is not there.
        config: settings.
        settings: of `run_settings`, kept as run.json; its kind is shown beside the progress bar.
        critic: a discriminator that learns beside the model; default none.
        held_out: what is measured every `config.validate_every` steps and at the end; default nothing.
        draw: pictures of how the run is doing, every `config.sample_every` steps, in the main process alone;
            default none. They, and what is measured, change nothing of the training.
        console: where that is shown; default standard output.

    Returns:
        The last logged metrics, with steps, seconds and the number of steps left out, and where held-out data
        was measured its least loss and the step after which it was.

    Raises:
        ValueError: the batch does not divide into parts and among processes; an interrupted run in `folder`
            was started with other settings, or its state is damaged; another process works in `folder`;
            patience without held-out data.
        FloatingPointError: `config.max_skipped` steps in a row, or all of them, had a loss or gradients that
            are not finite; the state that was saved last stays.
        Asked: a `SystemExit`: SIGTERM came, in any of the processes; the state is saved, the exit code 0.
    """
    if config.patience and (held_out is None or not config.validate_every):
        raise ValueError(
            f"TrainConfig: patience={config.patience} counts measurements of held-out data, and none are "
            "made; give held-out data and validate_every, or leave patience at 0"
        )
    with asked_to_end() as asked, _held_for_all(folder):
        lines = compare_settings(folder, settings)
        run = _Run(model, step_loss, data, folder, config, settings, critic, held_out, draw, console, asked)
        for line in (*lines, *run.lines) if run.is_main else ():
            (console or Console()).print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        if run.state.step:
            run.log.say(f"{settings['kind']}  goes on after step {run.state.step}")
        with run.log.shown():
            run.train()
            metrics = run.finish()
        run.close()
        return metrics


@contextmanager
def _held_for_all(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, which the main process does for all.

    Raises:
        ValueError: in all of them, if another run holds it, or there is a file of its name.
    """
    with ExitStack() as stack:
        reason = ""
        if _among_processes().is_main_process:
            try:
                stack.enter_context(held(folder))
            except (ValueError, OSError) as error:
                reason = str(error)
        [reason] = broadcast_object_list([reason])
        if reason:
            raise ValueError(reason)
        yield


class _Run:
    """A run under way: what it works with, one step of it, and what is done between steps."""

    def __init__(
        self,
        model: nn.Module,
        step_loss: StepLoss,
        data: BatchedDataset[Any],
        folder: Path,
        config: TrainConfig,
        settings: Mapping[str, Any],
        critic: Critic | None,
        held_out: HeldOut | None,
        draw: Draw | None,
        console: Console | None,
        asked: threading.Event,
    ) -> None:
        self.asked = asked
        self.model, self.step_loss, self.folder, self.config = model, step_loss, folder, config
        self.settings, self.critic = settings, critic
        self.held_out = held_out if config.validate_every else None
        self.accelerator = _accelerator(config)
        self.is_main = self.accelerator.is_main_process
        self.wrapped = prepared(model, self.accelerator, config.sharding)
        optimizer = build_optimizer(
            model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay[0]
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        models, optimizers = [model], [self.optimizer]
        if critic is not None:
            critic.prepare(self.accelerator)
            models, optimizers = [*models, critic.module], [*optimizers, critic.optimizer]
        self.checkpoint = Checkpoint(
            self.accelerator, models, optimizers, folder / "state", every=config.save_every, seed=config.seed
        )
        self.average = AveragedWeights(model, config.ema) if config.ema else None
        for part in (critic, self.average):
            if part is not None:
                self.checkpoint.register(part)
        self.lines, self.state = self.checkpoint.restore(), self.checkpoint.state
        self.together = dist.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None
        self.guard = StepGuard(self.accelerator.device, self.state)
        self.best = BestWeights(folder / "best", self.state, is_main=self.is_main)
        every = 0 if draw is None else config.sample_every
        self.samples = RunSamples(folder / "samples", draw if self.is_main else None, every, self.state.step)
        self.batches = self._batches(data)
        if self.is_main:
            keep_settings(folder, settings)
        self.log = self._log(console)
        self.metrics: dict[str, float] = {}  # of the last step that was logged

    def train(self) -> None:
        """Step until the run is at its end, or held-out data says that it is.

        Raises:
            Asked: the run was asked to end, and its state is saved.
        """
        self.wrapped.train()
        while True:
            progress, save_is_due, is_asked = self._agreed()
            if progress >= 1 or 0 < self.config.patience <= self.state.stale:
                return
            if save_is_due:
                self.guard.note(self.state)
                self.checkpoint.save()
                self.best.saved()
            if is_asked:
                self.log.say(f"ended by SIGTERM after step {self.state.step}; the same command goes on")
                raise Asked(self.state.step)
            start = time.monotonic()
            numbers = self._step(progress)
            self.state.step += 1
            if is_logged(self.state.step):
                self._read(numbers)
            self.state.seconds += time.monotonic() - start
            if is_logged(self.state.step):
                self._write()
            self._look()

    def finish(self) -> dict[str, float]:
        """Choose the weights, save them, and leave no state; the metrics of the run."""
        state = self.state
        self._check_skipped(at_end=True)
        if self.held_out is not None and state.measured != state.step:
            with self._at_rest():
                self._measure(self.held_out)
        result: dict[str, float] = {"steps": state.step, "seconds": round(state.seconds, 2)}
        weights = self._choose()
        if state.best_step:
            result |= {"best_step": state.best_step, "validation_loss": state.best_loss}
        full: Any = whole(self.model, is_main=self.is_main)
        if self.is_main:
            run = keep_settings(self.folder, self.settings, {"weights": weights, **result})
            full.save_pretrained(self.folder, model_card_kwargs={"run": run})
            draw_curve(read_metrics(self.log.path), self.folder / "curve.png")
            self.checkpoint.remove()
            self.best.remove()
        self.log.finish(f"{state.step} steps done, saved: {weights}")
        return {**self.metrics, **result, **self._left_out()}

    def close(self) -> None:
        """Wait for the others, and let go of what the run held."""
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        if self.together is not None:
            dist.destroy_process_group(self.together)

    def _step(self, progress: float) -> dict[str, float | Tensor]:
        """Move the weights by the gradient of one batch; what is logged, of its last part."""
        config, accelerator = self.config, self.accelerator
        set_progress(self.optimizer, progress, lr=config.lr, weight_decay=config.weight_decay)
        losses = []
        for _ in range(config.accumulate):
            batch = next(self.batches)
            with accelerator.accumulate(self.wrapped), accelerator.autocast():
                loss, numbers = self.step_loss(self.wrapped, batch, self.state.step)
            accelerator.backward(poisoned(loss))
            losses.append(loss.detach())
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip)
        norm = gathered(norm)
        moved, sound = self.guard.step(self.optimizer, norm, losses)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.state.step + 1, moved)
        critic = self.critic
        beside = {} if critic is None else critic.step(accelerator, progress, config.clip, sound)
        return {"loss": loss.detach(), **numbers, **beside, "grad_norm": norm}

    def _read(self, numbers: Mapping[str, float | Tensor]) -> None:
        """Take what a step gave; the host waits for the device here, for all steps since it did so last."""
        self._check_skipped()
        self.metrics = {**_on_host(numbers), **self._left_out()}

    def _left_out(self) -> dict[str, float]:
        """Steps left out so far; in float16 those are told apart for which its scale was too high."""
        rescaled = {} if self.accelerator.scaler is None else {"rescaled": self.state.rescaled}
        return {"skipped": self.state.skipped, **rescaled}

    def _write(self) -> None:
        """Log what was read of a step."""
        state = self.state
        progress = self.config.progress(state.step, state.seconds)
        self.log.write(state.step, state.seconds, progress, self.metrics)

    def _look(self) -> None:
        """Measure held-out data and draw, where it is time to."""
        step = self.state.step
        held_out = self.held_out if step % max(self.config.validate_every, 1) == 0 else None
        if held_out is None and not self.samples.is_due(step):
            return
        with self._at_rest():
            if held_out is not None:
                self._measure(held_out)
            if self.samples.is_due(step) and (full := whole(self.model, is_main=self.is_main)):
                self.samples.look(full, step)

    def _measure(self, held_out: HeldOut) -> None:
        """Measure held-out data, and keep the weights if they are the best so far."""
        state, num_processes = self.state, self.accelerator.num_processes
        numbers = measured(
            self.model,
            held_out,
            batch_size=self.config.part_size(num_processes),
            workers=self.config.workers,
            device=self.accelerator.device,
            together=self.together,
        )
        weights = cache(partial(whole, self.model, is_main=self.is_main))  # gathered at most once
        is_best = self.best.offer(weights, numbers["loss"])
        if held_out.inspect is not None:
            full = weights()
            if full is not None and self.is_main:
                numbers |= held_out.inspect(full)
        note = "the best so far" if is_best else f"best {state.best_loss:.4g} after step {state.best_step}"
        self.log.write_held_out(state.step, numbers, note)
        if self.is_main:
            draw_curve(read_metrics(self.log.path), self.folder / "curve.png")

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Inside, the model is as it would be saved: with averaged weights, evaluating, as it is written."""
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.in_place())
            if self.config.compile:  # what is compiled is for batches of the training
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(resting(self.model))
            stack.enter_context(undisturbed(self.model))
            yield

    def _choose(self) -> str:
        """Give the model the weights that the run ends with; which they are, in words."""
        if self.state.best_step:
            best = self.best.read() if self.is_main else None
            self.model.load_state_dict(from_main(best, self.model.state_dict(), self.accelerator.device))
            of = "the weights" if self.average is None else "the averaged weights"
            return f"{of} after step {self.state.best_step}, the best on held-out data"
        if self.average is not None:
            self.average.put()
            return "the averaged weights"
        return "the last weights"

    def _check_skipped(self, *, at_end: bool = False) -> None:
        """Raise `FloatingPointError` if too many steps in a row were left out, at the end if all were."""
        state = self.state
        self.guard.note(state)
        most = self.config.max_skipped + (SCALE_HALVINGS if self.accelerator.scaler is not None else 0)
        left_out = state.skipped + state.rescaled
        if state.skipped_longest < most and not (at_end and left_out == state.step > 0):
            return
        raise FloatingPointError(
            f"training: {state.skipped_longest} steps in a row, up to step {state.step}, were left out, as "
            "their loss or gradients are not finite; lower lr, or use mixed_precision='bf16' or 'no', in "
            f"another folder; {self.checkpoint.folder} has the state that was saved last, if any"
        )

    def _agreed(self) -> tuple[float, bool, bool]:
        """Progress, whether to save a state, and whether any process was asked to end.

        The first two go by the main process's clock: others would end the run or save at another step. From
        host to host: what a device is told is read from it only after all else that it was asked to do.
        """
        progress = self.config.progress(self.state.step, self.state.seconds)
        told = torch.tensor([progress, self.checkpoint.is_due(), self.asked.is_set()], dtype=torch.float64)
        if self.together is not None:
            if not self.is_main:
                told[:2] = 0
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.together)
        progress, save_is_due, is_asked = told.tolist()
        return progress, bool(save_is_due or (is_asked and self.checkpoint.is_behind())), bool(is_asked)

    def _batches(self, data: BatchedDataset[Any]) -> Iterator[list[Tensor]]:
        """This process's part of every batch from the present step on; a step takes `accumulate`."""
        config, accelerator, step = self.config, self.accelerator, self.state.step
        indices = EndlessBatches(
            len(data),
            config.part_size(accelerator.num_processes),
            seed=config.seed,
            start=step * config.accumulate,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            rows=True,
        )
        seed = seed_at(config.seed, step)
        return load_batches(
            data, indices, workers=config.workers, device=accelerator.device, seed=seed, draws=config.seed
        )

    def _log(self, console: Console | None) -> RunLog:
        config, state = self.config, self.state
        trackers = (
            start_trackers(config.trackers, self.folder, state.step, self.settings) if self.is_main else []
        )
        return RunLog(
            self.folder / "metrics.jsonl",
            self.settings["kind"],
            step=state.step,
            seconds=state.seconds,
            progress=config.progress(state.step, state.seconds),
            batch_size=config.batch_size,
            device=self.accelerator.device,
            is_main=self.is_main,
            trackers=trackers,
            console=console,
        )


def _among_processes() -> PartialState:
    """As an Accelerator makes it: the first one made decides whether processes know of one another."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@checked
def check_device(config: TrainConfig) -> None:
    """Raise `ValueError` unless a run can have what is asked for, on its device and among its processes.

    Inside of `viar.determinism.deterministic` that leaves out what no run repeats.

    Args:
        config: settings of the run.
    """
    for name, value in (("seconds", config.seconds), ("compile", config.compile or None)):
        if value is not None and is_deterministic():
            raise ValueError(
                f"TrainConfig: {name}={value} goes by measured times, which no run repeats; give steps alone "
                "and no compile, or leave deterministic"
            )
    check_launch()
    state = _among_processes()
    started = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if started > 1 and state.num_processes == 1:
        raise ValueError(
            f"TrainConfig: {started} processes started (WORLD_SIZE), but on this device ({state.device}) "
            "they do not know of one another, and each would train alone, into one folder; on CPUs set "
            "ACCELERATE_USE_CPU=true or use accelerate launch --cpu"
        )
    config.part_size(state.num_processes)
    check_trackers(config.trackers)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "TrainConfig: sharding is what spreads the weights over processes, the launcher asks for FSDP; "
            f"launch without that, and use sharding='full' for it, got {config.sharding!r}"
        )
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


def _accelerator(config: TrainConfig) -> Accelerator:
    # What is left of a run before would refuse another precision in the same process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulate
    )
    set_seed(config.seed, device_specific=True)
    return accelerator


def _on_host(numbers: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Plain numbers, the mean of all processes, which the host waits for once."""
    on_device = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    read = reduce(torch.stack([value.double() for value in on_device.values()]), reduction="mean").tolist()
    return {**numbers, **dict(zip(on_device, read, strict=True))}

"""Training of tokenizer and transformer: one loop, two losses.

A run lives in one folder: `config.json` and `model.safetensors` (readable by `from_pretrained`) when it
is done, `metrics.jsonl` as it goes, `state/` to resume from if it is interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.sources import Batch, EndlessBatches, TensorImages, all_batches
from ..generation.sampling import check_pair
from ..model.config import check_at_least
from ..model.transformer import NextScaleTransformer
from ..tokenizer import Tokenizer
from .losses import reconstruction_loss
from .optim import build_optimizer, set_progress

# (model as prepared for training, batch, step) -> loss, and further numbers to log
LossFunction = Callable[[nn.Module, Any, int], tuple[Tensor, dict[str, float | Tensor]]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run; the defaults are those published for the transformer.

    A run ends after `steps` steps or `seconds` of training, whichever comes first; the schedules follow
    whichever is nearer its end.
    """

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 512  # of all processes together, a step
    lr: float = 1.6e-4  # published: 8e-5 per 256 images of a batch (VAR: 1e-4)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: tuple[float, float] = (0.05, 0.08)  # first and last
    clip: float = 2.0  # largest gradient norm
    accumulate: int = 1  # batches are processed in so many parts
    mixed_precision: str = "no"  # "no", "bf16" or "fp16"
    workers: int = 0  # processes that read pictures
    save_every: float = 300.0  # seconds between states to resume from
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        if self.steps is None and self.seconds is None:
            raise ValueError("TrainConfig: give steps or seconds, so that the run has an end")
        check_at_least("TrainConfig", 1, batch_size=self.batch_size, accumulate=self.accumulate)
        check_at_least("TrainConfig", 0, workers=self.workers, seed=self.seed)
        for name in ("steps", "seconds", "lr", "clip", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainConfig: {name} must be positive, got {value}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"TrainConfig: mixed_precision must be 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}"
            )

    def progress(self, step: int, seconds: float) -> float:
        """How far the run is, 0 to 1."""
        parts = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(max(parts), 1.0)


@dataclass
class TrainState:
    """Where a run is; saved with it."""

    step: int = 0
    seconds: float = 0.0  # spent training, before interruptions included

    def state_dict(self) -> dict[str, float]:
        """For Accelerate's checkpoint."""
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """For Accelerate's checkpoint."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def train_tokenizer(
    tokenizer: Tokenizer,
    data: Dataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    loss: str = "l1+l2",
    revive_every: int = 20,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on images and save to `folder`; resumes a run that was interrupted there.

    The loss is the reconstruction's (`loss`, see `reconstruction_loss`) plus the quantizer's. The
    codebook starts from data; every `revive_every` steps codes that fell out of use are replaced.

    Returns:
        The last logged metrics, with steps, seconds, and the share of the codebook in use.
    """
    generator = torch.Generator()

    def step_loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        output = model(batch[0])
        quantizer = tokenizer.quantizer
        generator.manual_seed(config.seed * 1_000_003 + step)
        metrics: dict[str, float | Tensor] = {}
        if step == 0 and len(output.vectors) >= quantizer.codebook.num_embeddings:
            quantizer.init_codebook(_of_main_process(output.vectors), generator=generator)
            output = model(batch[0])
        elif (step + 1) % revive_every == 0:  # steps are logged as counted from 1
            vectors = _of_main_process(output.vectors)
            metrics["revived"] = quantizer.revive_dead_codes(vectors, generator=generator)
        reconstruction = reconstruction_loss(batch[0], output.reconstruction, loss)
        metrics |= {"reconstruction": reconstruction.detach(), "quantizer": output.loss.detach()}
        return reconstruction + output.loss, metrics

    metrics = fit(tokenizer, step_loss, data, folder, config, name="tokenizer", console=console)
    return metrics | {"codebook_usage": tokenizer.quantizer.total_codebook_usage()}


def train_transformer(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: Dataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on the tokens of images and save to `folder`; resumes a run that was interrupted there.

    Images that are held in memory are tokenized once, others batch by batch. The loss is the cross-entropy,
    plus the trunk's penalty where `ImplicitTrunkConfig.residual_weight` asks for one.

    Returns:
        The last logged metrics, with steps and seconds.
    """
    check_pair(model, tokenizer)
    tokenizer.eval().requires_grad_(False)
    in_memory = isinstance(data, TensorImages)
    samples = TokenizedImages(tokenizer, data) if in_memory else data
    depth = torch.Generator()  # of one seed in all processes, so that they draw the same depths

    def step_loss(wrapped: nn.Module, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        depth.manual_seed(config.seed * 1_000_003 + step)
        inputs, targets, labels = batch if in_memory else tokenize(tokenizer.to(batch[0].device), *batch)
        logits, penalty = wrapped(labels, inputs, generator=depth, return_penalty=True)
        loss = cross_entropy(logits, targets)
        if penalty is None:
            return loss, {}
        return loss + penalty, {"cross_entropy": loss.detach(), "penalty": penalty.detach()}

    return fit(model, step_loss, samples, folder, config, name="transformer", console=console)


class TokenizedImages(Dataset[Any]):
    """Teacher-forcing inputs, targets and labels of images in memory."""

    def __init__(self, tokenizer: Tokenizer, data: Dataset[Batch], batch_size: int = 256) -> None:
        device = next(tokenizer.parameters()).device
        parts = [
            [part.cpu() for part in tokenize(tokenizer, images.to(device), labels)]
            for images, labels in all_batches(data, batch_size)
        ]
        self.inputs, self.targets, self.labels = (torch.cat(part) for part in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A whole batch."""
        where = torch.as_tensor(indices)
        return self.inputs[where], self.targets[where], self.labels[where]


@torch.no_grad()
def tokenize(tokenizer: Tokenizer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher-forcing inputs (B, L - p_1^2, Z), targets (B, L) and labels (B,) of images."""
    with torch.autocast(images.device.type, enabled=False):  # features in half precision have other codes
        tokens = tokenizer.encode(images)
        return tokenizer.next_scale_inputs(tokens), torch.cat(tokens, 1), labels


def cross_entropy(
    logits_BLV: Tensor,
    targets_BL: Tensor,
) -> Tensor:
    """Mean over all positions of all scales, scalar."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


@torch.no_grad()
def validation_loss(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: Dataset[Batch],
    *,
    iterations: int | None = None,
    batch_size: int = 256,
) -> float:
    """Cross-entropy of held-out images in nats a token, in evaluation mode."""
    device = model.pos_embed.device
    training, total = model.training, 0.0
    model.eval()
    for images, labels in all_batches(data, batch_size):
        inputs, targets, labels = tokenize(tokenizer, images.to(device), labels.to(device))
        total += float(cross_entropy(model(labels, inputs, iterations), targets)) * len(labels)
    model.train(training)
    return total / len(data)


def fit(
    model: nn.Module,
    step_loss: LossFunction,
    data: Dataset[Any],
    folder: Path,
    config: TrainConfig,
    *,
    name: str,
    console: Console | None = None,
) -> dict[str, float]:
    """The loop: see `train_tokenizer` and `train_transformer`."""
    folder.mkdir(parents=True, exist_ok=True)
    # What is left of a run before would refuse another precision in the same process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulate
    )
    set_seed(config.seed, device_specific=True)
    optimizer = build_optimizer(model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay[0])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state, saved = TrainState(), folder / "state"
    accelerator.register_for_checkpointing(state)
    _tidy_up(accelerator, saved)
    if saved.is_dir():
        accelerator.load_state(str(saved))
    if accelerator.is_main_process and state.step == 0:
        (folder / "metrics.jsonl").unlink(missing_ok=True)

    loader = DataLoader(
        data,
        batch_sampler=EndlessBatches(
            len(data),
            _parts(config, accelerator.num_processes),
            seed=config.seed,
            start=state.step * config.accumulate,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        ),
        num_workers=config.workers,
        # One of its own: it seeds the workers, and must not move the generator that was just restored.
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + state.step),
        collate_fn=_already_collated,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    wrapped.train()
    metrics: dict[str, float] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  {task.fields[shown]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not accelerator.is_main_process,
    )
    with bar:
        task = bar.add_task(name, total=1.0, step=state.step, shown="")
        last_save, save_is_due = time.monotonic(), False
        loss = torch.zeros(())
        while True:
            progress = config.progress(state.step, state.seconds)
            progress, save_is_due = _agreed(accelerator, progress, save_is_due)
            if progress >= 1 or save_is_due:
                _check_finite(float(loss.detach()), state.step)
            if progress >= 1:
                break
            if save_is_due:
                _save_state(accelerator, saved)
                last_save = time.monotonic()
            start = time.monotonic()
            set_progress(optimizer, progress, lr=config.lr, weight_decay=config.weight_decay)
            logged: dict[str, float | Tensor] = {}
            for _ in range(config.accumulate):
                batch = [part.to(accelerator.device, non_blocking=True) for part in next(batches)]
                with accelerator.accumulate(wrapped), accelerator.autocast():
                    loss, logged = step_loss(wrapped, batch, state.step)
                accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            logged = {"loss": loss.detach()} | logged
            state.step += 1
            state.seconds += time.monotonic() - start
            if state.step % 10 == 0 or state.step == 1:
                metrics = {key: float(value) for key, value in logged.items()}
                _check_finite(metrics["loss"], state.step)
                shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                bar.update(task, completed=progress, step=state.step, shown=shown)
                if accelerator.is_main_process:
                    _append(folder / "metrics.jsonl", {"step": state.step, **metrics})
            save_is_due = time.monotonic() - last_save > config.save_every
        bar.update(task, completed=1.0, step=state.step)
    if accelerator.is_main_process:
        accelerator.unwrap_model(wrapped).save_pretrained(folder)
        if saved.is_dir():
            shutil.rmtree(saved.rename(_beside(saved, "new")))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return metrics | {"steps": state.step, "seconds": round(state.seconds, 2)}


def _parts(config: TrainConfig, num_processes: int) -> int:
    """Images all processes see between two accumulations."""
    if config.batch_size % (config.accumulate * num_processes):
        raise ValueError(
            f"TrainConfig: batch_size={config.batch_size} must divide among accumulate={config.accumulate} "
            f"parts and {num_processes} processes"
        )
    return config.batch_size // config.accumulate


def _already_collated(batch: Any) -> Any:
    return batch


def _agreed(accelerator: Accelerator, progress: float, save_is_due: bool) -> tuple[float, bool]:
    """What the main process's clock says: others would end the run or save at another step."""
    if accelerator.num_processes == 1:
        return progress, save_is_due
    ours = torch.tensor([progress, save_is_due], device=accelerator.device, dtype=torch.float64)
    progress, save_is_due = broadcast(ours).tolist()
    return progress, bool(save_is_due)


def _of_main_process(vectors: Tensor) -> Tensor:
    """The main process's vectors: codebooks must change alike everywhere."""
    return broadcast(vectors.contiguous())


def _save_state(accelerator: Accelerator, saved: Path) -> None:
    """Write a new state, then put it in the old one's place: an interruption leaves one that is whole."""
    fresh, old = _beside(saved, "new"), _beside(saved, "old")
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if saved.is_dir():
            saved.rename(old)
        fresh.rename(saved)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _tidy_up(accelerator: Accelerator, saved: Path) -> None:
    """Clear what an interruption of `_save_state` left."""
    fresh, old = _beside(saved, "new"), _beside(saved, "old")
    if accelerator.is_main_process:
        if old.is_dir() and not saved.is_dir():
            old.rename(saved)
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()


def _beside(saved: Path, suffix: str) -> Path:
    return saved.with_name(f"{saved.name}.{suffix}")


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training: the loss is {loss} at step {step}; lower lr, or use mixed_precision='bf16' or 'no'"
        )


def _append(path: Path, row: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")

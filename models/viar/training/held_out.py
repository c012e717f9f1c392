"""Held-out data that is measured while a run trains, and the weights that did best on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import BatchedDataset
from ..files import file_digest, flush, replacing_path
from ..model.transformer import NextScaleTransformer
from ..pretrained import WEIGHTS
from ..tokenizer import Tokenizer
from ..tokenizer.reconstruction import psnr, ssim
from .checkpoint import TrainState
from .health import NUM_SAMPLES, cell_health
from .loading import load_batches
from .losses import ToTokens, token_numbers

NAME = re.compile(r"step-\d+|\.step-\d+\..+")  # the other is what an interruption leaves of one

# (model in evaluation mode, batch) -> numbers by name, each one a sample (B,); "loss" is what should fall
Measure = Callable[[nn.Module, Sequence[Tensor]], dict[str, Tensor]]
# Further numbers of a model in evaluation mode, of which the main process alone asks
Inspect = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class HeldOut:
    """What is measured of which data."""

    data: BatchedDataset[Any]  # at least one sample
    measure: Measure
    inspect: Inspect | None = None


def tokenizer_measure(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """How close images (B, 3, H, W) in [-1, 1] come back from their tokens.

    Of each, (B,): "loss", the mean squared error of its pixels, "psnr" in dB and "ssim".
    """
    assert isinstance(model, Tokenizer)
    images = batch[0]
    made = model.decode(model.encode(images))
    error = (images - made).square().mean((1, 2, 3))
    return {"loss": error, "psnr": psnr(images, made), "ssim": ssim(images, made)}


def block_inspection(data: BatchedDataset[Any], to_tokens: ToTokens | None) -> Inspect:
    """Residual and spectral radius of an implicit block on the first samples, see `cell_health`.

    Args:
        data: held-out samples, at least one.
        to_tokens: makes a `TokenBatch` of a batch; None where batches are that already.
    """

    def inspect(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, NextScaleTransformer)
        samples = data.__getitems__(range(min(NUM_SAMPLES, len(data))))
        parts = [part.to(model.pos_embed.device) for part in samples]
        inputs, targets, labels = parts if to_tokens is None else to_tokens(*parts)
        return cell_health(model, (inputs, targets, labels))

    return inspect


def transformer_measure(to_tokens: ToTokens | None) -> Measure:
    """What `token_numbers` tells of the model's predictions.

    Args:
        to_tokens: makes a `TokenBatch` of a batch; None where batches are that already.
    """

    def measure(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, NextScaleTransformer)
        inputs, targets, labels = batch if to_tokens is None else to_tokens(*batch)
        return token_numbers(model(labels, inputs), targets, model.config.sides)

    return measure


@torch.no_grad()
def measured(
    model: nn.Module,
    held_out: HeldOut,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    together: dist.ProcessGroup | None,
) -> dict[str, float]:
    """Means over all samples; processes that train together each measure their share and get the same.

    The host waits for the device once, at the end.

    Args:
        model: in evaluation mode.
        held_out: what to measure.
        batch_size: samples at a time, of all processes.
        workers: processes that read.
        device: of the model.
        together: the processes, by their hosts; None where there is but one.
    """
    rank, num_ranks = (0, 1) if together is None else (together.rank(), together.size())
    shares = list(_shares(len(held_out.data), batch_size, rank, num_ranks))
    batches = load_batches(
        held_out.data, [share or [0] for share in shares], workers=workers, device=device, seed=0, draws=0
    )
    names: list[str] = []
    columns = []
    for share, batch in zip(shares, batches, strict=True):
        numbers = held_out.measure(model, batch)
        names = list(numbers)
        columns.append(torch.stack(list(numbers.values()))[:, : len(share)])
    sums = torch.cat(columns, 1).cpu().double().sum(1)
    if together is not None:
        dist.all_reduce(sums, group=together)
    return dict(zip(names, (sums / len(held_out.data)).tolist(), strict=True))


def _shares(size: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[list[int]]:
    """This process's samples of every batch: none in some, where all the same as many batches must be run."""
    for start in range(0, size, batch_size):
        yield list(range(start + rank, min(start + batch_size, size), num_ranks))


class BestWeights:
    """The weights of the least loss of held-out data, kept in `folder`/step-000200 for `from_pretrained`.

    Those that the state on disk names stay until another state is saved: a run that goes on from it finds
    them. The main process alone writes and removes.

    Args:
        folder: made when there is something to keep. Weights of a run before are removed.
        state: of the run, as it was restored; kept up to date.
        is_main: whether this is the main process.

    Raises:
        ValueError: the weights that the state names are gone or damaged.
    """

    def __init__(self, folder: Path, state: TrainState, *, is_main: bool) -> None:
        self.folder, self.state, self.is_main = folder, state, is_main
        if is_main and state.best_step:
            self._check()
        self.saved()

    @property
    def path(self) -> Path:
        """Of the best weights; there once `state.best_step` is not 0."""
        return self._of(self.state.best_step)

    def offer(self, weights: Callable[[], Any], loss: float) -> bool:
        """Keep the present weights if theirs is the least loss so far; whether it is.

        Args:
            weights: gives the model that has them, in the main process; all processes call it together.
            loss: of held-out data.
        """
        state = self.state
        state.measured = state.step
        if not loss < state.best_loss:
            state.stale += 1
            return False
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
        model = weights()
        if self.is_main:
            with replacing_path(self.path) as fresh:
                model.save_pretrained(fresh)
            for path in (self.folder, self.folder.parent):  # a state on the disk may name them from now on
                flush(path)
            state.best_digest = file_digest(self.path / WEIGHTS)
            self._keep({self._in_state, state.best_step})
        return True

    def read(self) -> dict[str, Tensor]:
        """The best weights, on the CPU.

        Raises:
            ValueError: they are gone or damaged.
        """
        self._check()
        return load_file(self.path / WEIGHTS)

    def saved(self) -> None:
        """Take note that the state on disk is the present one."""
        self._in_state = self.state.best_step
        self._keep({self._in_state})

    def remove(self) -> None:
        """Leave nothing, for a run that is done."""
        self._keep(set())
        if self.is_main and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _check(self) -> None:
        path, wanted = self.path / WEIGHTS, self.state.best_digest
        found = "nothing"
        if path.is_file():
            if not wanted or (digest := file_digest(path)) == wanted:
                return
            found = f"damaged ones (SHA-256 {digest[:8]}... instead of {wanted[:8]}...)"
        raise ValueError(
            f"{path}: expected the best weights so far, which the state of this run names, found {found}; "
            "put them back, or remove state/ beside best/ to start over"
        )

    def _keep(self, steps: set[int]) -> None:
        if not (self.is_main and self.folder.is_dir()):
            return
        kept = {self._of(step) for step in steps}
        for path in self.folder.iterdir():
            if NAME.fullmatch(path.name) and path not in kept:
                shutil.rmtree(path)

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

"""The two trainings: what each is fitted to, and with which loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from ..data import (
    Batch,
    BatchedDataset,
    ImageFolder,
    TensorImages,
    TokenizedImages,
    TokenShards,
    from_rows,
    rows_of,
    tokenize,
)
from ..data.tokens import TokenBatch
from ..generation.sampling import check_pair
from ..model.transformer import NextScaleTransformer
from ..pretrained import fingerprint
from ..tokenizer import Tokenizer
from .config import TrainConfig
from .loop import check_device, fit
from .losses import ToTokens, check_classes, tokenizer_loss, transformer_loss
from .samples import generated, reconstructed
from .settings import compare_settings, run_settings


def train_tokenizer(
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    loss: str = "l1+l2",
    revive_every: int = 20,
    init_codebook: bool = True,
    held_out: BatchedDataset[Batch] | None = None,
    origin: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on images and save to `folder`; resumes a run that was interrupted there.

    The loss is the reconstruction's plus the quantizer's.

    Args:
        tokenizer: trained in place.
        data: images with labels, which are not looked at.
        folder: of the run.
        config: settings.
        loss: terms of the reconstruction loss, see `reconstruction_loss`.
        revive_every: steps after which codes that fell out of use are replaced.
        init_codebook: start the codebook from data; false keeps that of a tokenizer that is trained already.
        held_out: images of which some are drawn beside what the tokenizer makes of them, every
            `config.sample_every` steps, into `folder`/samples; default none.
        origin: what the tokenizer was started from, kept with the run's settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps, seconds, and the share of the codebook in use.

    Raises:
        ValueError: a term of `loss` is unknown, the batch does not divide into parts and among processes, or
            `folder` has an interrupted run of other settings.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    check_device(config)
    step_loss = tokenizer_loss(
        tokenizer, kind=loss, revive_every=revive_every, init_codebook=init_codebook, seed=config.seed
    )
    settings = run_settings(
        tokenizer, data, config, loss=loss, revive_every=revive_every, origin=dict(origin or {})
    )
    draw = reconstructed(held_out) if held_out is not None and len(held_out) else None
    metrics = fit(tokenizer, step_loss, data, folder, config, settings=settings, draw=draw, console=console)
    return metrics | {"codebook_usage": tokenizer.quantizer.total_codebook_usage()}


def train_transformer(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch] | TokenShards,
    folder: Path,
    config: TrainConfig,
    *,
    class_names: Sequence[str] = (),
    origin: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on the tokens of images and save to `folder`; resumes a run that was interrupted there.

    Images that are held in memory are tokenized once, others batch by batch; of `TokenShards` nothing is. The
    loss is the cross-entropy, plus the trunk's penalty where `ImplicitTrunkConfig.residual_weight` asks for
    one. Every `config.sample_every` steps a grid of generated images is written into `folder`/samples, a row
    a class, of the first ten classes, always of the same seed.

    Args:
        model: trained in place.
        tokenizer: put into evaluation mode and frozen.
        data: images with labels, which are 0 to N - 1, or their tokens.
        folder: of the run.
        config: settings.
        class_names: of label 0, 1, ..., kept with the run's settings.
        origin: what the model was started from, kept with the run's settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps and seconds.

    Raises:
        ValueError: model and tokenizer differ in size, a label is not one of the model's classes, tokens are
            of another tokenizer or of another number of classes, the batch does not divide into parts and
            among processes, or `folder` has an interrupted run of other settings.
        FloatingPointError: the loss is not finite; nothing is saved then.
    """
    check_device(config)
    check_pair(model, tokenizer)
    if isinstance(data, TokenShards):
        data.check(tokenizer)
        processes = PartialState()
        data.verify(processes.process_index, processes.num_processes)
    _check_labels(data, model.config.num_classes)
    tokenizer.eval().requires_grad_(False)
    settings = run_settings(
        model,
        data,
        config,
        tokenizer=fingerprint(tokenizer),
        class_names=class_names,
        origin=dict(origin or {}),
    )
    compare_settings(folder, settings)  # before images are tokenized
    samples: BatchedDataset[Any]
    to_tokens: ToTokens | None = partial(_tokenized, tokenizer)
    if isinstance(data, TensorImages):
        samples, to_tokens = TokenizedImages(tokenizer, data), None
    else:
        samples = _OfClasses(data, model.config.num_classes)
    step_loss = transformer_loss(to_tokens, seed=config.seed)
    draw = generated(tokenizer)
    return fit(model, step_loss, samples, folder, config, settings=settings, draw=draw, console=console)


def _tokenized(tokenizer: Tokenizer, batch: Tensor, labels: Tensor) -> TokenBatch:
    """Of images, or of tokens that are known."""
    make = tokenize if batch.is_floating_point() else from_rows
    return make(tokenizer.to(batch.device), batch, labels)


class _OfClasses(Dataset[Any]):
    """`data`, its labels checked as they are read: on the device the host would have to wait for them."""

    def __init__(self, data: BatchedDataset[Any], num_classes: int) -> None:
        self.data, self.num_classes = data, num_classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._checked(self.data.__getitems__(indices))

    def draw(self, rows: Sequence[int], seed: int) -> Any:
        """What `rows_of` gives of `data`."""
        return self._checked(rows_of(self.data, rows, seed))

    def _checked(self, batch: Any) -> Any:
        check_classes(batch[1], self.num_classes)
        return batch


def _check_labels(data: BatchedDataset[Batch] | TokenShards, num_classes: int) -> None:
    """Raise unless labels are classes, where the data set tells them at once."""
    if isinstance(data, TensorImages):
        check_classes(data.labels, num_classes)
    elif isinstance(data, ImageFolder):
        check_classes(torch.tensor([label for _, label in data.files]), num_classes)
    elif isinstance(data, TokenShards) and data.settings.num_classes != num_classes:
        raise ValueError(
            f"{data.folder} holds tokens of {data.settings.num_classes} classes, the model has "
            f"{num_classes}; give the model as many (num_classes)"
        )

"""The two trainings: what each is fitted to, and with which loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor, nn
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
from ..kinds import checked
from ..model.config import check_at_least
from ..model.transformer import NextScaleTransformer
from ..pretrained import fingerprint
from ..tokenizer import Discriminator, Tokenizer
from .adversarial import AdversarialConfig
from .config import TrainConfig
from .critic import Critic
from .held_out import HeldOut, block_inspection, tokenizer_measure, transformer_measure
from .loop import check_device, fit
from .losses import ToTokens, check_classes, tokenizer_loss, transformer_loss
from .samples import generated, reconstructed
from .settings import compare_settings, run_settings


@checked
def train_tokenizer(
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch],
    folder: Path,
    config: TrainConfig,
    *,
    loss: str = "l1+l2",
    revive_every: int = 20,
    init_codebook: bool = True,
    perceptual: nn.Module | None = None,
    perceptual_weight: float = 1.0,
    adversarial: AdversarialConfig | None = None,
    held_out: BatchedDataset[Batch] | None = None,
    origin: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on images and save to `folder`; resumes a run that was interrupted there.

    The loss is the reconstruction's plus the quantizer's, and a perceptual and an adversarial one where asked
    for.

    Args:
        tokenizer: trained in place.
        data: images with labels, which are not looked at.
        folder: of the run.
        config: settings.
        loss: terms of the reconstruction loss, see `reconstruction_loss`.
        revive_every: steps after which codes that fell out of use are replaced.
        init_codebook: start the codebook from data; false keeps that of a tokenizer that is trained already.
        perceptual: called with images and reconstruction (B, 3, H, W) in [-1, 1], gives distances of any
            shape, whose mean is added to the loss: a `FeatureDistance`, say. Put into evaluation mode and
            frozen. Default none.
        perceptual_weight: of that mean.
        adversarial: of the loss that a discriminator gives; default none, as where its weight is 0.
        held_out: images to measure, which decide what weights the run ends with, see `fit`, and of which
            some are drawn above what the tokenizer makes of them, scale by scale, every
            `config.sample_every` steps, into `folder`/samples; default none.
        origin: what the tokenizer was started from, kept with the run's settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps, seconds, and the share of the codebook in use.

    Raises:
        ValueError: a term of `loss` is unknown, `perceptual_weight` is negative, the images are too small for
            the discriminator, the batch does not divide into parts and among processes, `folder` has an
            interrupted run of other settings, or `config` has sharding or checkpoint_activations, which are
            for transformers.
        FloatingPointError: too many steps in a row are not finite, see `fit`.
    """
    check_device(config)
    _check_for_tokenizer(config)
    check_at_least("train_tokenizer", 0, perceptual_weight=perceptual_weight)
    critic = _critic(tokenizer, adversarial, config)
    others: dict[str, Any] = {}  # absent where they are not used: a run of an earlier release goes on
    if critic is not None:
        others["adversarial"] = asdict(critic.config)
    if perceptual is not None:
        perceptual.eval().requires_grad_(False)
        others["perceptual"] = {"fingerprint": fingerprint(perceptual), "weight": perceptual_weight}
    step_loss = tokenizer_loss(
        tokenizer,
        kind=loss,
        revive_every=revive_every,
        init_codebook=init_codebook,
        seed=config.seed,
        perceptual=perceptual,
        perceptual_weight=perceptual_weight,
        critic=critic,
    )
    settings = run_settings(
        tokenizer, data, config, loss=loss, revive_every=revive_every, origin=dict(origin or {}), **others
    )
    if config.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    draw, measure = None, None
    if held_out is not None and len(held_out):
        draw, measure = reconstructed(held_out), HeldOut(held_out, tokenizer_measure)
    metrics = fit(
        tokenizer,
        step_loss,
        data,
        folder,
        config,
        settings=settings,
        critic=critic,
        held_out=measure,
        draw=draw,
        console=console,
    )
    return metrics | {"codebook_usage": tokenizer.quantizer.total_codebook_usage()}


def _check_for_tokenizer(config: TrainConfig) -> None:
    """Raise `ValueError` where settings are for transformers alone."""
    if config.sharding != "none":
        raise ValueError(
            f"TrainConfig: a tokenizer is trained with sharding='none', every process with all of it, got "
            f"{config.sharding!r}"
        )
    if config.checkpoint_activations:
        raise ValueError(
            "TrainConfig: checkpoint_activations is for the blocks of a transformer, and a tokenizer has "
            "none; leave it at False, and raise accumulate where memory is short"
        )


def _critic(
    tokenizer: Tokenizer, adversarial: AdversarialConfig | None, config: TrainConfig
) -> Critic | None:
    """A fresh discriminator, if there is to be one; PyTorch's generator is left as it was."""
    if adversarial is None or not adversarial.weight:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        discriminator = Discriminator(
            tokenizer.config.image_side,
            num_layers=adversarial.num_layers,
            base_channels=adversarial.base_channels,
        )
    return Critic(discriminator, adversarial, lr=config.lr)


@checked
def train_transformer(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    data: BatchedDataset[Batch] | TokenShards,
    folder: Path,
    config: TrainConfig,
    *,
    held_out: BatchedDataset[Batch] | TokenShards | None = None,
    class_names: Sequence[str] = (),
    origin: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train on the tokens of images and save to `folder`; resumes a run that was interrupted there.

    Images that are held in memory are tokenized once, others batch by batch; of `TokenShards` nothing is. The
    loss is the cross-entropy, plus the trunk's penalty where `residual_weight` or `jacobian_weight` of
    `ImplicitTrunkConfig` ask for one. Every `config.sample_every` steps a grid of generated images is written
    into `folder`/samples, a row a class, of the first ten classes, always of the same seed.

    Args:
        model: trained in place.
        tokenizer: put into evaluation mode and frozen.
        data: images with labels, which are 0 to N - 1, or their tokens.
        folder: of the run.
        config: settings.
        held_out: images or tokens to measure, which decide what weights the run ends with, see `fit`;
            default none.
        class_names: of label 0, 1, ..., kept with the run's settings.
        origin: what the model was started from, kept with the run's settings.
        console: where progress is shown; default standard output.

    Returns:
        The last logged metrics, with steps and seconds.

    Raises:
        ValueError: model and tokenizer differ in size, a label is not one of the model's classes, tokens are
            of another tokenizer or of another number of classes, the batch does not divide into parts and
            among processes, or `folder` has an interrupted run of other settings.
        FloatingPointError: too many steps in a row are not finite, see `fit`.
    """
    check_device(config)
    check_pair(model, tokenizer)
    for source in (data, held_out):
        if source is not None:
            _check_source(source, model, tokenizer)
    tokenizer.eval().requires_grad_(False)
    model.checkpoint_activations(config.checkpoint_activations)
    settings = run_settings(
        model,
        data,
        config,
        tokenizer=fingerprint(tokenizer),
        class_names=class_names,
        origin=dict(origin or {}),
    )
    compare_settings(folder, settings)  # before images are tokenized
    samples, to_tokens = _tokens_of(data, model, tokenizer)
    measure = None
    if held_out is not None and len(held_out) and config.validate_every:
        others, held_out_to_tokens = _tokens_of(held_out, model, tokenizer)
        inspect = block_inspection(others, held_out_to_tokens)
        measure = HeldOut(others, transformer_measure(held_out_to_tokens), inspect)
    if config.compile:
        for part in model.trunk.compiled_parts():
            part.compile()
    return fit(
        model,
        transformer_loss(to_tokens, seed=config.seed),
        samples,
        folder,
        config,
        settings=settings,
        held_out=measure,
        draw=generated(tokenizer),
        console=console,
    )


def _tokens_of(
    data: BatchedDataset[Batch] | TokenShards, model: NextScaleTransformer, tokenizer: Tokenizer
) -> tuple[BatchedDataset[Any], ToTokens | None]:
    """What to read, and what makes a `TokenBatch` of it: None of images in memory, tokenized here and now."""
    if isinstance(data, TensorImages):
        return TokenizedImages(tokenizer, data), None
    return _OfClasses(data, model.config.num_classes), partial(_tokenized, tokenizer)


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


def _check_source(
    data: BatchedDataset[Batch] | TokenShards, model: NextScaleTransformer, tokenizer: Tokenizer
) -> None:
    """Raise unless tokens are those of `tokenizer`, and labels classes, where the data tells them at once."""
    num_classes = model.config.num_classes
    if isinstance(data, TokenShards):
        data.check(tokenizer)
        processes = PartialState()
        data.verify(processes.process_index, processes.num_processes)
    if isinstance(data, TensorImages):
        check_classes(data.labels, num_classes)
    elif isinstance(data, ImageFolder):
        check_classes(torch.tensor([label for _, label in data.files]), num_classes)
    elif isinstance(data, TokenShards) and data.settings.num_classes != num_classes:
        raise ValueError(
            f"{data.folder} holds tokens of {data.settings.num_classes} classes, the model has "
            f"{num_classes}; give the model as many (num_classes)"
        )
